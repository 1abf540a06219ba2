//! `state.json`: where a run stands, and what it must find again to go on.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optim::scaler::LossScale;

/// The file's name in a checkpoint.
pub const STATE_FILE: &str = "state.json";

/// The version of this format.
const FORMAT_VERSION: u32 = 1;

/// A run's position; the same for every rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    format_version: u32,
    /// Steps done: which samples come next. Advances even when an update is skipped.
    pub step: u64,
    /// Updates applied: what the learning rate and Adam's bias correction count.
    pub updates: u64,
    /// The loss scale.
    pub loss_scale: LossScale,
    /// Updates passed over because their numbers were not finite, those apart that a loss scale mended.
    pub non_finite: u64,
    /// What the run was started with.
    pub identity: Identity,
}

/// Checksums of what a run reads; a resumed run must find the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Of the base model: its tensors' names, dtypes, shapes and sampled contents.
    pub base: String,
    /// Of the training samples: their ids and what of them is learned.
    pub data: String,
}

impl RunState {
    /// The state before the first step.
    pub fn start(loss_scale: LossScale, identity: Identity) -> Self {
        Self { format_version: FORMAT_VERSION, step: 0, updates: 0, loss_scale, non_finite: 0, identity }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = serde_json::to_string_pretty(self).expect("numbers and strings make JSON") + "\n";
        std::fs::write(&path, text).map_err(Error::io("write", &path))
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let place = path.display().to_string();
        let state: Self =
            serde_json::from_str(&text).map_err(|e| Error::invalid(&place, format!("is not a run's state: {e}")))?;
        if state.format_version != FORMAT_VERSION {
            let what = format!("has format version {}, this program reads {FORMAT_VERSION}", state.format_version);
            return Err(Error::invalid(&place, what).hint("resume with the version of bellora that wrote it"));
        }
        Ok(state)
    }
}
