//! The loss scale of fp16 training: as large as the gradients allow without overflow. Its rule is carried out on the
//! device, in [`StepControl`](super::control::StepControl).

use serde::{Deserialize, Serialize};
use tch::Kind;

/// Good updates after which the scale doubles.
pub(super) const GROWTH_INTERVAL: u32 = 2000;
const INITIAL: f64 = 65_536.0;
/// The least scale; an update that overflows with it cannot be mended by scaling.
pub const SMALLEST: f64 = 1.0;
pub(super) const LARGEST: f64 = 16_777_216.0;

/// The factor on the loss, part of a run's state.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f64,
    good_updates: u32,
    dynamic: bool,
}

impl LossScale {
    /// The scale that training in a dtype begins with.
    pub fn of(kind: Kind) -> Self {
        if kind == Kind::Half { Self::dynamic() } else { Self::none() }
    }

    /// A scale that is 1 and stays so: fp32 and bf16 have the range.
    pub fn none() -> Self {
        Self { scale: SMALLEST, good_updates: 0, dynamic: false }
    }

    /// The dynamic scale of fp16.
    pub fn dynamic() -> Self {
        Self { scale: INITIAL, good_updates: 0, dynamic: true }
    }

    /// A scale as it stands after some updates.
    pub(super) fn new(scale: f64, good_updates: u32, dynamic: bool) -> Self {
        Self { scale, good_updates, dynamic }
    }

    /// The present factor, a power of two.
    pub fn factor(&self) -> f64 {
        self.scale
    }

    /// Good updates since the factor last changed.
    pub fn good_updates(&self) -> u32 {
        self.good_updates
    }

    /// Whether an overflow is part of normal operation (fp16) rather than an error.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic
    }
}
