//! Where a training stands.

use serde::{Deserialize, Serialize};

use crate::engine::optim::loss_scale::LossScale;

/// A training's position; the same for every rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done: which samples come next. Advances even when an update is skipped.
    pub step: u64,
    /// Updates applied: what the learning rate and Adam's bias correction count.
    pub updates: u64,
    /// The loss scale.
    pub loss_scale: LossScale,
    /// Updates passed over because their numbers were not finite, those apart that a loss scale mended.
    pub non_finite: u64,
}

impl TrainState {
    /// The state before the first step.
    pub fn start(loss_scale: LossScale) -> Self {
        Self { step: 0, updates: 0, loss_scale, non_finite: 0 }
    }
}
