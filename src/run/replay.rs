//! An update of a run once more, from the nearest checkpoint before it: the loss of each of its samples, and whether it comes
//! out as `metrics.jsonl` has it. Nothing in the run's folder is changed, and the run may go on meanwhile.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::manifest::{Newest, checkpoints, newest_good_before};
use crate::checkpoint::state::{ComputedOn, Record};
use crate::comm::Solo;
use crate::config::{Config, Meaning};
use crate::engine::metrics::StepMetrics;
use crate::engine::non_finite::{SampleLoss, json_line};
use crate::engine::step::Trainer;
use crate::error::{Error, Result};
use crate::log::{METRICS_FILE, Metrics};
use crate::run::begin::same_identity;
use crate::run::folder::{CHECKPOINTS_DIR, expect_run};
use crate::run::resume_position::{ResumePosition, computed_on};
use crate::run::setup::{CacheUse, Job};

/// The keys of a line of metrics that a clock decides.
const OF_A_CLOCK: [&str; 2] = ["step_secs", "tokens_per_s"];

/// A run as it stood at some step before the one to replay.
pub struct Replay {
    /// Where it stands, with the parameters and moments that it had there.
    pub trainer: Trainer,
    /// The checkpoint that this was read from; `None`: the run's start.
    pub from: Option<PathBuf>,
    /// Newer checkpoints that are damaged and were passed over.
    pub damaged: Vec<(PathBuf, Error)>,
    /// What decides how sums are rounded here, and what did when the run had the step; `None`: no checkpoint says so.
    pub computed_on: (ComputedOn, Option<ComputedOn>),
    run_dir: PathBuf,
    /// The step to replay, counted from 1.
    step: u64,
}

/// An update that was done again.
pub struct Replayed {
    /// Its samples in its order, each with its own loss before the update.
    pub samples: Vec<SampleLoss>,
    /// Its line as `metrics.jsonl` would have it, without what a clock says.
    pub line: Map<String, Value>,
    /// What the run wrote of it.
    pub recorded: Recorded,
}

/// What `metrics.jsonl` says of a step, beside what came out here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recorded {
    /// It has no line of that step.
    Nothing,
    /// Every number is the same, to the last bit.
    Same,
    /// The keys whose values are others: key, here, there.
    Others(Vec<(String, String, String)>),
}

impl Replay {
    /// Opens a run before a step, counted from 1: at its newest whole checkpoint from before that step, or at its start.
    /// `sets` override keys of its config.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a folder that holds no run, a step that the run does not have, and a base or samples that are
    /// no longer those of the run.
    pub fn open(run_dir: &Path, step: u64, sets: &[String]) -> Result<Self> {
        expect_run(run_dir)?;
        let after = record_after(run_dir, step)?;
        let config = config_of_step(run_dir, after.as_ref(), sets)?;
        // Tokens that the run has cached are read, and none are written where it did not.
        let job = Job::inspect(config, CacheUse::Read, 1)?;
        if step == 0 || step > job.total_steps {
            let what = format!("the run has no step {step}");
            return Err(Error::invalid("--step", what).hint(format!("name one from 1 to {}", job.total_steps)));
        }
        if let Some(record) = &after {
            same_identity(&job, record, &[], run_dir)?;
        }
        let Opened { mut trainer, from, before, damaged } = newest_before(&job, run_dir, step)?;
        // What an update is depends on its samples and the state before it, not on when its outcome is asked for.
        trainer.steps_ahead = 0;
        // The update is looked at, whatever the run made of it.
        trainer.settings.max_non_finite = u64::MAX;
        let there = after.or(before).map(|record| record.computed_on);
        let computed_on = (computed_on(&job), there);
        Ok(Self { trainer, from, damaged, computed_on, run_dir: run_dir.to_path_buf(), step })
    }

    /// Does the steps before the one to replay again, and calls `done` with the metrics of each.
    ///
    /// # Errors
    /// Those of a step.
    pub fn catch_up(&mut self, mut done: impl FnMut(&StepMetrics)) -> Result<()> {
        while self.trainer.state.step + 1 < self.step {
            if let Some(metrics) = self.trainer.step()? {
                done(&metrics);
            }
        }
        Ok(())
    }

    /// Does the step itself, after [`Self::catch_up`]. The parameters and moments are then those that it left.
    ///
    /// # Errors
    /// Those of a step; [`Error::Io`] for metrics that cannot be read.
    pub fn replay(&mut self) -> Result<Replayed> {
        let samples = self.trainer.next_samples();
        let samples = self.trainer.sample_losses(self.step, &samples)?;
        let metrics = self.trainer.step()?.ok_or_else(|| Error::failed("the step", "has no outcome"))?;
        let path = self.run_dir.join(METRICS_FILE);
        let written = Metrics::read(&path)?.unwrap_or_default();
        let recorded = recorded(&metrics, &written);
        Ok(Replayed { samples, line: line(&metrics), recorded })
    }
}

/// What the first checkpoint says that is not from before a step.
fn record_after(run_dir: &Path, step: u64) -> Result<Option<Record>> {
    let mut after = checkpoints(&run_dir.join(CHECKPOINTS_DIR))?.into_iter().filter(|(at, _)| *at >= step);
    Ok(after.find_map(|(_, dir)| Record::read(&dir).ok()))
}

/// The config by which the run had a step: the first checkpoint after it knows. A run may have been resumed since with
/// another length, and so another learning rate, or with other micro-batches.
fn config_of_step(run_dir: &Path, after: Option<&Record>, sets: &[String]) -> Result<Config> {
    let mut all = Vec::new();
    if let Some(record) = after {
        let changes = Config::load_run(run_dir, sets)?.differences(&record.config).into_iter().filter(|change| {
            // The device is what there is.
            let is_restored = matches!(change.meaning, Meaning::Length | Meaning::Rounding);
            is_restored && change.theirs != "not set" && change.key != "model.device"
        });
        all.extend(changes.map(|change| format!("{}={}", change.key, change.theirs)));
    }
    all.extend_from_slice(sets);
    Config::load_run(run_dir, &all)
}

/// A run at some step.
struct Opened {
    trainer: Trainer,
    from: Option<PathBuf>,
    before: Option<Record>,
    damaged: Vec<(PathBuf, Error)>,
}

/// The run at its newest whole checkpoint from before a step, or at its start.
fn newest_before(job: &Job, run_dir: &Path, step: u64) -> Result<Opened> {
    loop {
        let Newest { good, damaged } = newest_good_before(&run_dir.join(CHECKPOINTS_DIR), step)?;
        let from = good.map(|(_, dir)| dir);
        let opened = open_at(job, run_dir, from.as_deref());
        // A run that goes on may have deleted one meanwhile: then there is a newer one.
        let looked_at = damaged.iter().map(|(dir, _)| dir).chain(&from);
        if looked_at.into_iter().all(|dir| dir.is_dir()) {
            let (trainer, before) = opened?;
            return Ok(Opened { trainer, from, before, damaged });
        }
    }
}

fn open_at(job: &Job, run_dir: &Path, checkpoint: Option<&Path>) -> Result<(Trainer, Option<Record>)> {
    let record = checkpoint.map(Record::read).transpose()?;
    if let Some(record) = &record {
        same_identity(job, record, &[], run_dir)?;
    }
    Ok((ResumePosition::read(job, checkpoint)?.trainer(job, Box::new(Solo))?, record))
}

/// The line of a step without what a clock says.
fn line(metrics: &StepMetrics) -> Map<String, Value> {
    let mut line = match serde_json::to_value(metrics) {
        Ok(Value::Object(line)) => line,
        _ => Map::new(),
    };
    OF_A_CLOCK.iter().for_each(|key| drop(line.shift_remove(*key)));
    line
}

/// Holds a step's numbers against the line that the run wrote. As texts: every number is
/// written with all its digits, so that equal texts are equal bits.
fn recorded(metrics: &StepMetrics, written: &Metrics) -> Recorded {
    let ours = json_line(metrics);
    let is_of_the_step = |line: &str| field(line, "loss").is_some() && field(line, "step") == field(&ours, "step");
    let texts = written.lines().filter_map(|line| std::str::from_utf8(line.text).ok());
    let Some(theirs) = texts.rev().find(|line| is_of_the_step(line)) else { return Recorded::Nothing };
    let mut others = Vec::new();
    for (key, _) in line(metrics) {
        let (here, there) = (field(&ours, &key).unwrap_or("nothing"), field(theirs, &key).unwrap_or("nothing"));
        if here != there {
            others.push((key, here.to_owned(), there.to_owned()));
        }
    }
    if others.is_empty() { Recorded::Same } else { Recorded::Others(others) }
}

/// The text of a value in a line of metrics, which holds numbers and truths alone. A torn line has no last value.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("\"{key}\":"))?;
    Some(rest[..rest.find([',', '}'])?].trim())
}
