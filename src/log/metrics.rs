//! `metrics.jsonl`: one line of JSON for every update and every evaluation.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use super::file::LogFile;
use crate::disk::{self, Disk};
use crate::engine::metrics::StepMetrics;
use crate::error::{Error, Result};

/// The file's name in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

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

/// The whole lines of the steps up to `last_step`, and how many they are. A run whose metrics were taken away goes on without
/// the old ones.
fn kept_lines(path: &Path, last_step: u64) -> Result<(Vec<u8>, u64)> {
    let (mut kept, mut n_lines) = (Vec::new(), 0);
    let metrics = Metrics::read(path)?.unwrap_or_default();
    for line in metrics.lines().filter(|line| line.step.is_some_and(|step| step <= last_step)) {
        kept.extend_from_slice(line.text);
        if !line.is_whole() {
            kept.push(b'\n');
        }
        n_lines += 1;
    }
    Ok((kept, n_lines))
}

/// The text of a `metrics.jsonl`.
#[derive(Debug, Default)]
pub struct Metrics {
    text: Vec<u8>,
}

/// A line of it.
#[derive(Debug, Clone, Copy)]
pub struct MetricsLine<'a> {
    /// Its bytes, with the line break if there is one.
    pub text: &'a [u8],
    /// The step it is of; `None` for a line that is none of metrics, or torn.
    pub step: Option<u64>,
    /// Whether it is of an update; an evaluation's has no `loss`.
    pub is_update: bool,
}

impl MetricsLine<'_> {
    /// Whether the line ends; the last one may be torn, or being written.
    pub fn is_whole(&self) -> bool {
        self.text.ends_with(b"\n")
    }
}

impl Metrics {
    /// Reads a file; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(path: &Path) -> Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(text) => Ok(Some(Self { text })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Its lines in order.
    pub fn lines(&self) -> impl DoubleEndedIterator<Item = MetricsLine<'_>> {
        #[derive(Deserialize)]
        struct Keys {
            step: u64,
            #[serde(default, deserialize_with = "is_there")]
            loss: bool,
        }
        fn is_there<'de, D: Deserializer<'de>>(value: D) -> std::result::Result<bool, D::Error> {
            IgnoredAny::deserialize(value).map(|_| true)
        }
        self.text.split_inclusive(|&byte| byte == b'\n').map(|text| {
            let keys = serde_json::from_slice::<Keys>(text).ok();
            MetricsLine {
                text,
                step: keys.as_ref().map(|keys| keys.step),
                is_update: keys.is_some_and(|keys| keys.loss),
            }
        })
    }
}
