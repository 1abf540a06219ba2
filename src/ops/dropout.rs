//! Dropout whose mask is a pure function of where an element stands in the run, never of how it was packed.
//!
//! The mask bits are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the seed
//! and of (step, sample slot, site, token in sample, channel). Nothing is stored: backward draws the same mask again.
//! One draw of 128 bits serves eight neighbouring channels with 16 bits each.

use tch::Tensor;

use crate::error::Result;
use crate::torch::{self, MaskDraw};

/// What an update's masks depend on, with the share that is dropped.
#[derive(Debug, Clone, Copy)]
pub struct DropoutKey {
    /// Probability of an element to be dropped, in `[0, 1)`; resolved in steps of 2^-16.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// The 0-based step.
    pub step: u32,
}

/// Where the rows of a micro-batch come from: `[N]` each, i64 on the CPU.
#[derive(Debug)]
pub struct RowOrigin {
    /// The sample's slot in the run's sequence of samples.
    pub slot_n: Tensor,
    /// The token's position in its sample.
    pub token_n: Tensor,
}

/// Returns `x ⊙ mask / (1 - p)` for the input site `site` (block · 4 + which of its four inputs); `x` itself if p is 0.
pub fn apply(x_nc: &Tensor, key: DropoutKey, site: u32, origin: &RowOrigin) -> Result<Tensor> {
    let drop_below = threshold(key.p);
    if drop_below == 0 {
        return Ok(x_nc.shallow_clone());
    }
    let draw = MaskDraw { seed: key.seed, step: key.step, site, drop_below };
    torch::dropout(x_nc, &origin.slot_n, &origin.token_n, draw)
}

/// A 16-bit draw below this is dropped.
fn threshold(p: f64) -> u32 {
    (p * 65536.0).round() as u32
}
