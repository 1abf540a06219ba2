//! Learning-rate schedules as Hugging Face's: linear warmup, then cosine, linear or constant.

use crate::choice::choice;

choice! {
    /// The shape after the warmup.
    Shape {
        /// Half a cosine down to zero.
        Cosine = "cosine",
        /// A straight line down to zero.
        Linear = "linear",
        /// No decay.
        Constant = "constant",
    }
}

/// The learning rate of every update of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The peak.
    pub learning_rate: f64,
    /// The shape after the warmup.
    pub shape: Shape,
    /// Updates of the rise.
    pub warmup: u64,
    /// Updates of the run.
    pub total: u64,
}

impl LrSchedule {
    /// The learning rate of update `i`, counted from 0; with a warmup the first one has rate 0.
    pub fn lr(&self, i: u64) -> f64 {
        self.learning_rate * self.multiplier(i)
    }

    fn multiplier(&self, i: u64) -> f64 {
        if i < self.warmup {
            return i as f64 / self.warmup.max(1) as f64;
        }
        let progress = (i - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.shape {
            Shape::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
            Shape::Linear => (1.0 - progress).max(0.0),
            Shape::Constant => 1.0,
        }
    }
}

/// The updates of a warmup given as a share of the run: rounded up.
pub fn warmup_updates(total: u64, ratio: f64) -> u64 {
    (total as f64 * ratio).ceil() as u64
}
