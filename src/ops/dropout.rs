//! Dropout whose mask is a pure function of where an element stands in the run, never of how it was packed.
//!
//! The mask bits are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the seed
//! and of (step, sample slot, site, token in sample, channel). Nothing is stored: backward draws the same mask again.
//! One draw of 128 bits serves eight neighbouring channels with 16 bits each.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::ops::target::{Form, Target};
use crate::torch::number::{WithNumber, filled, range};
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

/// Where the rows of a micro-batch come from: `[N]` each, i64 on the device of the rows.
#[derive(Debug)]
pub struct RowOrigin {
    /// The sample's slot in its update.
    pub slot_n: Tensor,
    /// The token's position in its sample.
    pub token_n: Tensor,
}

/// Returns `x ⊙ mask / (1 - p)` for the input site `site` (block · 4 + which of its four inputs); `x` itself if p is 0.
pub fn apply(target: Target, x_nc: &Tensor, key: DropoutKey, site: u32, origin: &RowOrigin) -> Result<Tensor> {
    let drop_below = threshold(key.p);
    if drop_below == 0 {
        return Ok(x_nc.shallow_clone());
    }
    let draw = MaskDraw { seed: key.seed, step: key.step, site, drop_below };
    match target.dropout() {
        Form::CpuRows => torch::dropout(x_nc, &origin.slot_n, &origin.token_n, draw),
        Form::Plain => plain_apply(x_nc, origin, draw),
    }
}

/// A 16-bit draw below this is dropped.
fn threshold(p: f64) -> u32 {
    (p * 65536.0).round() as u32
}

/// Philox calls made at a time: each of the tensors on the way holds so many 64-bit numbers.
const CALLS_AT_ONCE: i64 = 1 << 21;

/// The same bits by libtorch's integer ops, some rows at a time: every device, if slowly, and equal to the CPU's kernel bit
/// for bit.
pub fn plain_apply(x_nc: &Tensor, origin: &RowOrigin, draw: MaskDraw) -> Result<Tensor> {
    let (n_rows, channels) = x_nc.size2()?;
    let n_calls = (channels + 7) / 8;
    // As the CPU's kernel has it: an fp32 number, whatever the dtype.
    let kept = 65536.0f32 / (65536 - draw.drop_below) as f32;
    let out = x_nc.f_times(f64::from(kept))?;
    let calls_1b = range(0, n_calls, (Kind::Int64, x_nc.device()))?.f_unsqueeze(0)?;
    let at_once = (CALLS_AT_ONCE / n_calls.max(1)).max(1);
    let mut first = 0;
    while first < n_rows {
        let n = at_once.min(n_rows - first);
        let row = |t: &Tensor| -> Result<Tensor> { Ok(t.f_narrow(0, first, n)?.f_bits_and(U32)?.f_unsqueeze(1)?) };
        let counter = [
            calls_1b.f_bits_or(i64::from(draw.site) << 16)?.f_bits_and(U32)?,
            row(&origin.token_n)?,
            row(&origin.slot_n)?,
            filled(&[1, 1], i64::from(draw.step), (Kind::Int64, x_nc.device()))?,
        ];
        // Word i of a call holds the draws of channels 2i (its lower half) and 2i + 1.
        let draws = philox(counter, draw.seed)?.map(|word| -> Result<[Tensor; 2]> {
            let is_dropped = |half: Tensor| half.f_bits_and(0xffff)?.f_is_below(i64::from(draw.drop_below));
            let high = word.f_bits_down(16)?;
            Ok([is_dropped(word)?, is_dropped(high)?])
        });
        let mut dropped = Vec::with_capacity(8);
        for halves in draws {
            dropped.extend(halves?);
        }
        let dropped_nc = Tensor::f_stack(&dropped, -1)?.f_view([n, 8 * n_calls])?.f_narrow(1, 0, channels)?;
        out.f_narrow(0, first, n)?.f_fill_where_(&dropped_nc, 0.0)?;
        first += n;
    }
    Ok(out)
}

/// The lower 32 bits.
const U32: i64 = 0xffff_ffff;

/// Philox 4x32 with ten rounds. The words of the counter have shapes that broadcast; each is the lower half of a 64-bit
/// number, of which the first and third have nothing above it.
///
/// A product of two 32-bit numbers wraps around as the unsigned one does, so its bits are right.
fn philox(mut c: [Tensor; 4], seed: u64) -> Result<[Tensor; 4]> {
    const FACTORS: [i64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let [c0, c1, c2, c3] = c;
        let (from_c0, from_c2) = (c0.f_times(FACTORS[0])?, c2.f_times(FACTORS[1])?);
        let mixed = |product: &Tensor, other: Tensor, key: u32| -> Result<Tensor> {
            let high = product.f_bits_down(32)?;
            high.f_bitwise_xor_tensor(&other)?.f_bits_xor(i64::from(key))?.f_bits_and(U32)
        };
        c = [mixed(&from_c2, c1, key[0])?, from_c2, mixed(&from_c0, c3, key[1])?, from_c0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    Ok(c)
}
