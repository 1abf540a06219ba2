//! `state.json`: where a run stands, and what it must find again to go on.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::engine::state::TrainState;
use crate::error::{Error, Result};

/// The file's name in a checkpoint.
pub const STATE_FILE: &str = "state.json";

/// The version of this format. Checkpoints of [`FORMAT_2`] are read too.
const FORMAT_VERSION: u32 = 3;

/// The first version that is read: it has a checksum of the base in place of what the base is, and nothing of the validation
/// samples.
const FORMAT_2: u32 = 2;

/// What a run reads; a resumed run must find the same base and training samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The base model.
    pub base: BaseIdentity,
    /// A checksum of the training samples: their ids and what of them is learned.
    pub data: String,
    /// The same of the validation samples; nothing where there are none, or where an older checkpoint does not say.
    #[serde(default)]
    pub validation: Option<String>,
}

/// What tells a base model from another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BaseIdentity {
    /// The values of `config.json` that decide what is computed, by their names there, and under `tensors` a checksum of the
    /// tensors' names, dtypes, shapes and sampled contents.
    Named(Map<String, Value>),
    /// A checksum of all that in one, as [`FORMAT_2`] has it.
    Sum(String),
}

impl BaseIdentity {
    /// The names of the values that differ, with this identity's value and the other's. A name that one side lacks is of
    /// another version of the program, and is passed over.
    ///
    /// `None` where one of the two is a checksum and not the other.
    pub fn differences(&self, other: &Self) -> Option<Vec<(String, Value, Value)>> {
        match (self, other) {
            (Self::Named(ours), Self::Named(theirs)) => {
                let both = ours.iter().filter_map(|(name, ours)| Some((name, ours, theirs.get(name)?)));
                let differing = both.filter(|(_, ours, theirs)| ours != theirs);
                Some(differing.map(|(name, ours, theirs)| (name.clone(), ours.clone(), theirs.clone())).collect())
            }
            (Self::Sum(ours), Self::Sum(theirs)) if ours == theirs => Some(Vec::new()),
            _ => None,
        }
    }
}

/// What a checkpoint says of its run, beside parameters and moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    format_version: u32,
    /// Where the run stands.
    #[serde(flatten)]
    pub state: TrainState,
    /// What the run was started with.
    pub identity: Identity,
    /// Steps of an epoch, and of the whole run as it was meant then.
    pub schedule: Extent,
    /// Lines of `metrics.jsonl`.
    pub metrics_lines: u64,
    /// The newest evaluation.
    pub evaluated: Option<Evaluated>,
    /// Whether the step was to be evaluated still, when a signal came.
    pub evaluation_is_due: bool,
    /// What the updates were computed on.
    pub computed_on: ComputedOn,
    /// The run's config, `section.key` to value.
    pub config: Map<String, Value>,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Steps of the run.
    pub total_steps: u64,
}

/// An evaluation that was done.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// After this step.
    pub step: u64,
    /// What it gave; nothing if that was not a finite number.
    pub eval_loss: Option<f64>,
}

/// What decides how sums are rounded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputedOn {
    /// `cpu`, or the name of a GPU.
    pub device: String,
    /// Threads that a CPU's operations are spread over.
    pub threads: i32,
    /// Ranks that share an update.
    #[serde(default = "one")]
    pub ranks: usize,
}

/// The ranks of a run whose checkpoint does not say.
fn one() -> usize {
    1
}

impl std::fmt::Display for ComputedOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { device, threads, ranks } = self;
        let many = |n: usize| if n == 1 { "" } else { "s" };
        write!(f, "{device} with {threads} thread{}", many(*threads as usize))?;
        if *ranks > 1 { write!(f, " on each of {ranks} ranks") } else { Ok(()) }
    }
}

impl Record {
    /// Takes down what is known at a step.
    pub fn new(
        state: TrainState,
        identity: Identity,
        schedule: Extent,
        computed_on: ComputedOn,
        config: Map<String, Value>,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            state,
            identity,
            schedule,
            metrics_lines: 0,
            evaluated: None,
            evaluation_is_due: false,
            computed_on,
            config,
        }
    }

    /// The evaluation loss of this very step.
    pub fn eval_loss(&self) -> Option<f64> {
        self.evaluated.filter(|evaluated| evaluated.step == self.state.step)?.eval_loss
    }

    pub(super) fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and strings make JSON") + "\n"
    }

    /// Reads the record of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is none, or of another version; [`Error::Io`].
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let place = path.display().to_string();
        let broken = |error: serde_json::Error| Error::invalid(&place, format!("is not a run's state: {error}"));
        let value: Value = serde_json::from_str(&text).map_err(broken)?;
        if ![FORMAT_2, FORMAT_VERSION].iter().any(|version| value["format_version"] == *version) {
            let what = format!(
                "has format version {}, this program reads {FORMAT_2} and {FORMAT_VERSION}",
                value["format_version"]
            );
            return Err(Error::invalid(&place, what).hint("resume with the version of bellora that wrote it"));
        }
        serde_json::from_value(value).map_err(broken)
    }
}
