//! What a run tells: the console and `train.log` for people, `metrics.jsonl` and TensorBoard files for programs.
//!
//! The training loop owns one [`RunLog`]. A line of `metrics.jsonl` is written for every update; console,
//! `train.log` and TensorBoard get every `log_every`th. Files that cannot be written are errors; the console never is,
//! and never keeps the training waiting.

mod console;
mod metrics;
mod tensorboard;

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub use metrics::{EvalMetrics, MetricsFile, StepMetrics};
pub use tensorboard::EventFile;

use crate::error::{Error, Result};
use console::Console;

/// Where a run stands when its log is opened.
#[derive(Debug, Clone, Copy)]
pub struct LogSettings {
    /// The step the run goes on from; 0 starts over.
    pub last_step: u64,
    /// The step it ends with.
    pub total_steps: u64,
    /// Updates between lines on the console and points in TensorBoard; 0 is never.
    pub log_every: u64,
}

/// Everything a run writes about itself while it goes on.
pub struct RunLog {
    settings: LogSettings,
    console: Console,
    text: File,
    text_path: PathBuf,
    metrics: MetricsFile,
    events: EventFile,
    /// The moving average of the seconds a step takes.
    step_secs: Option<f64>,
}

impl RunLog {
    /// Opens `train.log`, `metrics.jsonl` and `tensorboard/` in a run directory that exists.
    ///
    /// `train.log` is appended to. Of metrics and events what lies after `last_step` is void: those steps come again.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(run_dir: &Path, settings: LogSettings) -> Result<Self> {
        let text_path = run_dir.join("train.log");
        let text = OpenOptions::new().append(true).create(true).open(&text_path);
        let metrics_path = run_dir.join("metrics.jsonl");
        Ok(Self {
            settings,
            console: Console::start(settings.total_steps),
            text: text.map_err(Error::io("open", &text_path))?,
            text_path,
            metrics: match settings.last_step {
                0 => MetricsFile::create(&metrics_path)?,
                last_step => MetricsFile::resume(&metrics_path, last_step)?,
            },
            events: EventFile::create(&run_dir.join("tensorboard"), settings.last_step + 1)?,
            step_secs: None,
        })
    }

    /// Tells what is about to be done, a line each.
    ///
    /// # Errors
    /// [`Error::Io`] for `train.log`, as in every method here.
    pub fn banner<T: AsRef<str>>(&mut self, lines: &[T]) -> Result<()> {
        lines.iter().try_for_each(|line| self.line(line.as_ref()))
    }

    /// Records an update.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.metrics.step(step)?;
        // A tenth of the newest step: smooth over samples of unequal length, yet quick to follow a change.
        let smooth = |old: f64| 0.9 * old + 0.1 * step.step_secs;
        let step_secs = *self.step_secs.insert(self.step_secs.map_or(step.step_secs, smooth));
        if self.settings.log_every == 0 || !step.step.is_multiple_of(self.settings.log_every) {
            return Ok(());
        }
        self.events.step(step)?;
        let n_left = self.settings.total_steps.saturating_sub(step.step);
        let text = step_line(step, self.settings.total_steps, n_left as f64 * step_secs);
        self.append(&text)?;
        self.console.progress(step.step, text);
        Ok(())
    }

    /// Records an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.metrics.eval(eval)?;
        self.events.eval(eval)?;
        let EvalMetrics { step, eval_loss, perplexity, samples, eval_secs, .. } = eval;
        let time = duration(*eval_secs);
        self.line(&format!(
            "step {step}  eval loss {eval_loss:.4}  perplexity {perplexity:.3}  {samples} samples  {time}"
        ))
    }

    /// Tells something by the way.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn note(&mut self, text: &str) -> Result<()> {
        self.line(text)
    }

    /// Tells something that may need attention.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn warn(&mut self, text: &str) -> Result<()> {
        self.line(&format!("warning: {text}"))
    }

    /// Brings the files to the disk, so that a checkpoint written after it never knows more than they do.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.events.sync()
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.append(text)?;
        self.console.line(text.to_owned());
        Ok(())
    }

    fn append(&mut self, text: &str) -> Result<()> {
        self.text.write_all(format!("{text}\n").as_bytes()).map_err(Error::io("write", &self.text_path))
    }
}

fn step_line(step: &StepMetrics, total_steps: u64, left_secs: f64) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    let mut text = format!("step {}/{total_steps}  loss {}", step.step, number(step.loss));
    // Writing to a text cannot fail.
    let _ = write!(text, "  grad norm {}  lr {:.2e}", number(step.grad_norm), step.lr);
    let _ = write!(text, "  {:.0} tokens/s  ETA {}", step.tokens_per_s, duration(left_secs));
    if step.skipped {
        text.push_str("  (update skipped)");
    }
    text
}

/// Words a time in its two largest units.
fn duration(secs: f64) -> String {
    let secs = secs.round().max(0.0) as u64;
    match (secs / 86400, secs / 3600 % 24, secs / 60 % 60, secs % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, s) => format!("{min} min {s} s"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}
