//! `metrics.jsonl`: one line of JSON for every update and every evaluation.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepMetrics {
    /// The update, counted from 1.
    pub step: u64,
    /// The mean loss over the global batch; `None` when nothing was to be learned.
    pub loss: Option<f64>,
    /// The gradient's L2 norm before clipping; `None` when there was none.
    pub grad_norm: Option<f64>,
    /// The learning rate used.
    pub lr: f64,
    /// Samples of the global batch.
    pub samples: u64,
    /// Tokens of the global batch.
    pub tokens: u64,
    /// Tokens that were learned.
    pub label_tokens: u64,
    /// Wall-clock seconds.
    pub step_secs: f64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// The loss scale used; 1 where there is none.
    pub loss_scale: f64,
    /// Whether the parameters were left as they are.
    pub skipped: bool,
}

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
    file: File,
    path: PathBuf,
}

impl MetricsFile {
    /// Begins an empty file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Goes on with the file of a run that resumes after `last_step`: keeps its lines up to that step, and drops later
    /// and torn ones. The file is replaced in one move, so that an interruption here costs no line.
    ///
    /// For no line to be missing afterwards, a step's lines must be written and synced before its checkpoint is.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(path: &Path, last_step: u64) -> Result<Self> {
        let kept = path.with_extension("jsonl.new");
        copy_lines(path, &kept, last_step)?;
        fs::rename(&kept, path).map_err(Error::io("replace", path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("open", path))?;
        let metrics = Self { file, path: path.to_owned() };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))?;
        }
        Ok(metrics)
    }

    /// Writes the line of an update.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.line(step)
    }

    /// Writes the line of an evaluation; it has no key `loss`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.line(eval)
    }

    /// Brings all lines to the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }

    fn line(&mut self, values: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(values).map_err(std::io::Error::from);
        let written = line.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()));
        written.map_err(Error::io("write", &self.path))
    }
}

fn copy_lines(from: &Path, to: &Path, last_step: u64) -> Result<()> {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    let mut kept = BufWriter::new(File::create(to).map_err(Error::io("create", to))?);
    let lines = match File::open(from) {
        Ok(file) => Some(BufReader::new(file).split(b'\n')),
        // A run whose metrics were taken away goes on without the old ones.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io("read", from)(error)),
    };
    for line in lines.into_iter().flatten() {
        let mut line = line.map_err(Error::io("read", from))?;
        if serde_json::from_slice::<Step>(&line).is_ok_and(|line| line.step <= last_step) {
            line.push(b'\n');
            kept.write_all(&line).map_err(Error::io("write", to))?;
        }
    }
    let file = kept.into_inner().map_err(|error| Error::io("write", to)(error.into_error()))?;
    file.sync_all().map_err(Error::io("sync", to))
}
