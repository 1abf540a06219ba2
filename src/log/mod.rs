//! What a run tells: the console and `train.log` for people, `metrics.jsonl` and TensorBoard files for programs.
//!
//! The training loop owns one [`RunLog`]. A line of `metrics.jsonl` is written for every update; console,
//! `train.log` and TensorBoard get every `log_every`th. Files that cannot be written are errors, but for a full disk: lines
//! then wait in memory until there is room. The console never is an error, and never keeps the training waiting.

mod bar;
mod console;
mod file;
mod metrics;
mod tensorboard;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

pub use bar::show_progress;
pub use console::{say, speak_as_rank};
pub use metrics::{EvalMetrics, METRICS_FILE, Metrics, MetricsFile, MetricsLine};
pub use tensorboard::{EventFile, count_records};

use crate::disk::Disk;
use crate::engine::metrics::StepMetrics;
use crate::error::Result;
use console::Console;
use file::LogFile;

/// The folder of TensorBoard's files in a run's.
pub const EVENTS_DIR: &str = "tensorboard";

/// Where a run stands when its log is opened.
#[derive(Debug, Clone, Copy)]
pub struct LogSettings {
    /// The step the run goes on from; 0 starts over.
    pub last_step: u64,
    /// The lines that `metrics.jsonl` had then, where that is known; `None` when starting over.
    pub last_lines: Option<u64>,
    /// The step it ends with.
    pub total_steps: u64,
    /// Updates between lines on the console and points in TensorBoard; 0 is never.
    pub log_every: u64,
    /// Whether the console says nothing: another rank of the job speaks for all.
    pub is_silent: bool,
}

/// Everything a run writes about itself while it goes on.
pub struct RunLog {
    settings: LogSettings,
    console: Console,
    text: LogFile,
    metrics: MetricsFile,
    events: EventFile,
    /// Whether it was said that lines wait for room on the disk.
    is_waiting: bool,
    /// The moving average of the seconds a step takes.
    step_secs: Option<f64>,
}

impl RunLog {
    /// Opens `train.log`, `metrics.jsonl` and `tensorboard/` in a run directory that exists.
    ///
    /// `train.log` is appended to. Of metrics and events what lies after `last_step` is void: those steps come again.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn open(disk: &Arc<dyn Disk>, run_dir: &Path, settings: LogSettings) -> Result<Self> {
        let metrics_path = run_dir.join(METRICS_FILE);
        let mut log = Self {
            settings,
            console: if settings.is_silent { Console::silent() } else { Console::start(settings.total_steps) },
            text: LogFile::append_to(disk, &run_dir.join("train.log"))?,
            metrics: match settings.last_step {
                0 => MetricsFile::create(disk, &metrics_path)?,
                last_step => MetricsFile::resume(disk, &metrics_path, last_step)?,
            },
            events: EventFile::create(disk, &run_dir.join(EVENTS_DIR), settings.last_step + 1)?,
            is_waiting: false,
            step_secs: None,
        };
        let (found, step) = (log.n_lines(), settings.last_step);
        if let Some(expected) = settings.last_lines.filter(|expected| *expected != found) {
            log.warn(&format!(
                "{} has {found} lines of the steps up to {step}, but had {expected} when the checkpoint was written: \
                 some were lost, added or changed since",
                metrics_path.display()
            ))?;
        }
        Ok(log)
    }

    /// Tells what is about to be done, a line each.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io), as in every method here, but for a full disk: what is told then waits.
    pub fn banner<T: AsRef<str>>(&mut self, lines: &[T]) -> Result<()> {
        lines.iter().try_for_each(|line| self.line(line.as_ref()))?;
        self.tell_of_room()
    }

    /// Records an update.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.metrics.step(step)?;
        // A tenth of the newest step: smooth over samples of unequal length, yet quick to follow a change.
        let smooth = |old: f64| 0.9 * old + 0.1 * step.step_secs;
        let step_secs = *self.step_secs.insert(self.step_secs.map_or(step.step_secs, smooth));
        if self.settings.log_every == 0 || !step.step.is_multiple_of(self.settings.log_every) {
            return self.tell_of_room();
        }
        self.events.step(step)?;
        let n_left = self.settings.total_steps.saturating_sub(step.step);
        let text = step_line(step, self.settings.total_steps, n_left as f64 * step_secs);
        self.append(&text)?;
        self.console.progress(step.step, text);
        self.tell_of_room()
    }

    /// Records an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.metrics.eval(eval)?;
        self.events.eval(eval)?;
        let EvalMetrics { step, eval_loss, perplexity, samples, eval_secs, .. } = eval;
        let time = duration(*eval_secs);
        self.line(&format!(
            "step {step}  eval loss {eval_loss:.4}  perplexity {perplexity:.3}  {samples} samples  {time}"
        ))?;
        self.tell_of_room()
    }

    /// Tells something by the way.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn note(&mut self, text: &str) -> Result<()> {
        self.line(text)?;
        self.tell_of_room()
    }

    /// Tells something that may need attention.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn warn(&mut self, text: &str) -> Result<()> {
        self.line(&format!("warning: {text}"))?;
        self.tell_of_room()
    }

    /// Keeps something in `train.log` that the console need not show.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn record(&mut self, text: &str) -> Result<()> {
        self.append(text)?;
        self.tell_of_room()
    }

    /// How many lines `metrics.jsonl` has.
    pub fn n_lines(&self) -> u64 {
        self.metrics.n_lines()
    }

    /// What brings metrics and events to the disk, to be called from any thread.
    pub fn durable(&self) -> Durable {
        Durable { metrics: self.metrics.file.clone(), events: self.events.file.clone() }
    }

    /// Brings metrics and events to the disk.
    ///
    /// # Errors
    /// As [`Durable::sync`].
    pub fn flush(&mut self) -> Result<()> {
        let done = self.durable().sync();
        self.tell_of_room()?;
        done
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.append(text)?;
        self.console.line(text.to_owned());
        Ok(())
    }

    fn append(&mut self, text: &str) -> Result<()> {
        self.text.append(format!("{text}\n").as_bytes())
    }

    /// Says when lines begin to wait for room on the disk, and when they wait no more.
    fn tell_of_room(&mut self) -> Result<()> {
        let files = [&self.text, &*self.metrics.file, &*self.events.file];
        let waiting = files.into_iter().find(|file| file.is_waiting());
        match (waiting, self.is_waiting) {
            (Some(file), false) => {
                self.is_waiting = true;
                let path = file.path().display();
                self.line(&format!("warning: no room on the disk for {path}: what it lacks waits until there is"))
            }
            (None, true) => {
                self.is_waiting = false;
                self.line("there is room on the disk again: train.log, metrics and events lack nothing")
            }
            _ => Ok(()),
        }
    }
}

/// The files that a checkpoint must not know more than.
#[derive(Debug, Clone)]
pub struct Durable {
    metrics: Arc<LogFile>,
    events: Arc<LogFile>,
}

impl Durable {
    /// Brings all that was told before to the disk; after it a checkpoint may be written.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io); also when lines wait because the disk is full.
    pub fn sync(&self) -> Result<()> {
        self.metrics.sync()?;
        self.events.sync()
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
