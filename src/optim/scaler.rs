//! The loss scale of fp16 training: as large as the gradients allow without overflow.

use serde::{Deserialize, Serialize};

/// Good updates after which the scale doubles.
const GROWTH_INTERVAL: u32 = 2000;
const INITIAL: f64 = 65_536.0;
const SMALLEST: f64 = 1.0;
const LARGEST: f64 = 16_777_216.0;

/// The factor on the loss, part of a run's state.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f64,
    good_updates: u32,
    dynamic: bool,
}

impl LossScale {
    /// A scale that is 1 and stays so: fp32 and bf16 have the range.
    pub fn none() -> Self {
        Self { scale: 1.0, good_updates: 0, dynamic: false }
    }

    /// The dynamic scale of fp16.
    pub fn dynamic() -> Self {
        Self { scale: INITIAL, good_updates: 0, dynamic: true }
    }

    /// The present factor, a power of two.
    pub fn factor(&self) -> f64 {
        self.scale
    }

    /// Whether an overflow is part of normal operation (fp16) rather than an error.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic
    }

    /// Takes note of an update whose gradients were finite, or not.
    pub fn update(&mut self, finite: bool) {
        if !self.dynamic {
            return;
        }
        if !finite {
            self.scale = (self.scale / 2.0).max(SMALLEST);
            self.good_updates = 0;
            return;
        }
        self.good_updates += 1;
        if self.good_updates == GROWTH_INTERVAL {
            self.scale = (self.scale * 2.0).min(LARGEST);
            self.good_updates = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_after_good_updates_and_halves_on_overflow() {
        let mut scale = LossScale::dynamic();
        for _ in 0..GROWTH_INTERVAL - 1 {
            scale.update(true);
        }
        assert_eq!(scale.factor(), INITIAL);
        scale.update(true);
        assert_eq!(scale.factor(), 2.0 * INITIAL);
        scale.update(true);
        scale.update(false);
        assert_eq!(scale.factor(), INITIAL);
        for _ in 0..40 {
            scale.update(false);
        }
        assert_eq!(scale.factor(), SMALLEST);
    }
}
