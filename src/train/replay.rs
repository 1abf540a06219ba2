//! An update of a run once more, from the nearest checkpoint before it: what each of its samples lost, and whether it comes
//! out as `metrics.jsonl` has it. Nothing in the run's folder is changed, and the run may go on meanwhile.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::Kind;

use crate::checkpoint::load;
use crate::checkpoint::manifest::{checkpoints, verify};
use crate::checkpoint::state::RunState;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::log::StepMetrics;
use crate::optim::adamw::{AdamW, AdamWConfig};
use crate::optim::scaler::LossScale;
use crate::train::non_finite::{SampleLoss, json_line};
use crate::train::run::{CHECKPOINTS_DIR, CONFIG_FILE, METRICS_FILE, holds_run, same_identity};
use crate::train::setup::Job;
use crate::train::step::Trainer;

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
    ///
    /// # Errors
    /// [`Error::Invalid`] for a folder that holds no run, a step that the run does not have, and a base or samples that are
    /// no longer those of the run.
    pub fn open(run_dir: &Path, step: u64) -> Result<Self> {
        if !holds_run(run_dir) {
            let what = format!("holds no run: there is no {CONFIG_FILE}");
            return Err(
                Error::invalid(run_dir.display().to_string(), what).hint("name the folder that train.output named")
            );
        }
        let config = Config::load(&run_dir.join(CONFIG_FILE), &[])?;
        // Tokens that the run has cached are read, and none are written where it did not.
        let cache = config.data.cache_dir.clone();
        let job = Job::inspect(config, Some(&*cache).filter(|cache| cache.is_dir()))?;
        if step == 0 || step > job.total_steps {
            let what = format!("the run has no step {step}");
            return Err(Error::invalid("--step", what).hint(format!("name one from 1 to {}", job.total_steps)));
        }
        let (mut trainer, from, damaged) = newest_before(&job, run_dir, step)?;
        // What an update is depends on its samples and the state before it, not on when its outcome is asked for.
        trainer.steps_ahead = 0;
        // The update is looked at, whatever the run made of it.
        trainer.settings.max_non_finite = u64::MAX;
        Ok(Self { trainer, from, damaged, run_dir: run_dir.to_path_buf(), step })
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
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(Error::io("read", &path))?,
        };
        let recorded = recorded(&metrics, &String::from_utf8_lossy(&text));
        Ok(Replayed { samples, line: line(&metrics), recorded })
    }
}

/// The run at its newest whole checkpoint from before a step, or at its start; with newer ones that are damaged.
fn newest_before(job: &Job, run_dir: &Path, step: u64) -> Result<(Trainer, Option<PathBuf>, Vec<(PathBuf, Error)>)> {
    loop {
        let mut damaged = Vec::new();
        let mut opened = None;
        for (at, dir) in checkpoints(&run_dir.join(CHECKPOINTS_DIR))?.into_iter().rev() {
            if at >= step {
                continue;
            }
            match verify(&dir) {
                Ok(_) => {
                    opened = Some((open_at(job, Some(&dir), run_dir), dir));
                    break;
                }
                Err(error) => damaged.push((dir, error)),
            }
        }
        // A run that goes on may have deleted one meanwhile: then there is a newer one.
        let looked_at = damaged.iter().map(|(dir, _)| dir).chain(opened.iter().map(|(_, dir)| dir));
        if looked_at.into_iter().any(|dir| !dir.is_dir()) {
            continue;
        }
        return match opened {
            Some((trainer, dir)) => Ok((trainer?, Some(dir), damaged)),
            None => Ok((open_at(job, None, run_dir)?, None, damaged)),
        };
    }
}

/// The run as a checkpoint has it, or as it was before its first step.
fn open_at(job: &Job, checkpoint: Option<&Path>, run_dir: &Path) -> Result<Trainer> {
    let settings = &job.model.config.train;
    let mut params = job.model.initial_params()?;
    let adamw = AdamWConfig { betas: settings.betas, eps: settings.eps, weight_decay: settings.weight_decay };
    let optimizer = AdamW::new(adamw, &params)?;
    let scale = match job.model.kind() {
        Kind::Half => LossScale::dynamic(),
        _ => LossScale::none(),
    };
    let mut state = RunState::start(scale, job.identity());
    if let Some(dir) = checkpoint {
        let moments = optimizer.named_moments(params.layout())?;
        let loaded = load::load(dir, &mut params, &moments)?;
        same_identity(&loaded, &state, run_dir)?;
        state = loaded;
    }
    let model = job.model.load(&params)?;
    Trainer::new(job.step_settings(), job.train.clone(), model, params, optimizer, state)
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

/// Holds a step's numbers against the line that the run wrote, in the text of `metrics.jsonl`. As texts: every number is
/// written with all its digits, so that equal texts are equal bits.
fn recorded(metrics: &StepMetrics, text: &str) -> Recorded {
    let ours = json_line(metrics);
    let is_of_the_step = |line: &&str| field(line, "loss").is_some() && field(line, "step") == field(&ours, "step");
    let Some(theirs) = text.lines().rfind(is_of_the_step) else { return Recorded::Nothing };
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
