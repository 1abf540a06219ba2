//! `metrics.jsonl`: one line of JSON for every update and every evaluation.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::file::LogFile;
use crate::disk::{self, Disk};
use crate::engine::metrics::StepMetrics;
use crate::error::{Error, Result};

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalMetrics {
    /// The updates done before it.
    pub step: u64,
    /// The sum of the losses of all label tokens over their number.
    pub eval_loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Samples evaluated.
    pub samples: u64,
    /// Their label tokens.
    pub label_tokens: u64,
    /// Wall-clock seconds.
    pub eval_secs: f64,
}

/// The open file. Every line is handed to the system at once, so that a killed process loses none.
///
/// Numbers have all their digits; one that is not finite is `null`, for JSON has no other word for it.
#[derive(Debug)]
pub struct MetricsFile {
    pub(super) file: Arc<LogFile>,
    n_lines: u64,
}

impl MetricsFile {
    /// Begins an empty file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(disk: &Arc<dyn Disk>, path: &Path) -> Result<Self> {
        Ok(Self { file: Arc::new(LogFile::create(disk, path)?), n_lines: 0 })
    }

    /// Goes on with the file of a run that resumes after `last_step`: keeps its lines up to that step, and drops later
    /// and torn ones. The file is replaced in one move, so that an interruption here costs no line.
    ///
    /// For no line to be missing afterwards, a step's lines must be written and synced before its checkpoint is.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(disk: &Arc<dyn Disk>, path: &Path, last_step: u64) -> Result<Self> {
        let (kept, n_lines) = kept_lines(path, last_step)?;
        disk::put_file(&**disk, path, &kept)?;
        Ok(Self { file: Arc::new(LogFile::append_to(disk, path)?), n_lines })
    }

    /// How many lines the file has, those included that wait for room on the disk.
    pub fn n_lines(&self) -> u64 {
        self.n_lines
    }

    /// Writes the line of an update.
    ///
    /// # Errors
    /// [`Error::Io`], but not for a full disk: the line then waits.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.line(step)
    }

    /// Writes the line of an evaluation; it has no key `loss`.
    ///
    /// # Errors
    /// As [`MetricsFile::step`].
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.line(eval)
    }

    fn line(&mut self, values: &impl Serialize) -> Result<()> {
        let mut line =
            serde_json::to_vec(values).map_err(|error| Error::io("write", self.file.path())(error.into()))?;
        line.push(b'\n');
        self.n_lines += 1;
        self.file.append(&line)
    }
}

/// Reads the whole lines of the steps up to `last_step`, and counts them.
fn kept_lines(path: &Path, last_step: u64) -> Result<(Vec<u8>, u64)> {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    let lines = match File::open(path) {
        Ok(file) => Some(BufReader::new(file).split(b'\n')),
        // A run whose metrics were taken away goes on without the old ones.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let (mut kept, mut n_lines) = (Vec::new(), 0);
    for line in lines.into_iter().flatten() {
        let line = line.map_err(Error::io("read", path))?;
        if serde_json::from_slice::<Step>(&line).is_ok_and(|line| line.step <= last_step) {
            kept.extend_from_slice(&line);
            kept.push(b'\n');
            n_lines += 1;
        }
    }
    Ok((kept, n_lines))
}
