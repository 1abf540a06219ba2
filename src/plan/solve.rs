//! From bytes to tokens: the largest micro-batch that a device can hold.

use crate::error::{Error, Result};
use crate::plan::gib;
use crate::plan::memory::MemoryModel;

/// Of all memory, one part in so many is left free: allocators round, and blocks of one size do not serve another.
///
/// libtorch's allocator hands out pieces of segments that it keeps. Micro-batches differ in length, so that pieces differ
/// in size from step to step, and some lie idle between others. A sixteenth is what a run is given for that.
const MARGIN: i64 = 16;

/// Micro-batches of this many tokens keep a GPU's multipliers busy: its products then do more work for each byte of a
/// weight than any GPU needs to be bound by arithmetic (about 300 operations a byte).
const BUSY_TOKENS: i64 = 1024;

/// No micro-batch is larger: more tokens make no product quicker.
const MOST_TOKENS: i64 = 1 << 16;

/// Sizes that are chosen freely are multiples of this, as products like them.
const STEP: i64 = 64;

/// What a device can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Solved {
    /// Tokens of a micro-batch.
    pub tokens: i64,
    /// Whether the blocks' activations are computed again in backward.
    pub recompute: bool,
}

/// The bounds of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// `data.max_length`: one sample must fit.
    pub max_length: i64,
    /// The tokens of the largest update there can be: more are never needed.
    pub update: i64,
}

impl Bounds {
    fn most(&self) -> i64 {
        self.update.clamp(self.max_length, MOST_TOKENS.max(self.max_length))
    }
}

/// What a run may use of so many bytes; the rest is the margin.
pub fn usable(available: i64) -> i64 {
    available - available / MARGIN
}

/// What the user has settled of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its tokens.
    pub tokens: Option<i64>,
    /// Whether activations are computed again.
    pub recompute: Option<bool>,
}

/// Settles the rest: the size by [`largest_micro_batch`]; recompute, for a size that is given, where it does not fit without.
///
/// `model` is the memory of the run without and with recompute.
///
/// # Errors
/// As [`largest_micro_batch`], where the size is not given.
pub fn settle(model: impl Fn(bool) -> MemoryModel, wanted: Wanted, available: i64, bounds: Bounds) -> Result<Solved> {
    let (keeping, recomputing) = (model(false), model(true));
    if let Some(tokens) = wanted.tokens {
        let fits = keeping.total(tokens) <= usable(available);
        return Ok(Solved { tokens, recompute: wanted.recompute.unwrap_or(!fits) });
    }
    let keeping = (wanted.recompute != Some(true)).then_some(&keeping);
    let recomputing = (wanted.recompute != Some(false)).then_some(&recomputing);
    largest_micro_batch(keeping, recomputing, available, bounds)
}

/// Finds the largest micro-batch whose passes fit into `available` bytes, weights and parameters included, less the margin.
///
/// `keeping` and `recomputing` are the memory of the run without and with recompute; where the choice has been made, only
/// one is given. Recompute makes a step half as long again, so it is chosen only where memory asks for it: where without
/// it not even [`BUSY_TOKENS`] fit, or not the longest sample, or (if that is less) not a whole update.
///
/// # Errors
/// [`Error::Invalid`] when the longest sample does not fit either way, with the numbers and what to lower.
pub fn largest_micro_batch(
    keeping: Option<&MemoryModel>,
    recomputing: Option<&MemoryModel>,
    available: i64,
    bounds: Bounds,
) -> Result<Solved> {
    let usable = usable(available);
    let most = |model: &MemoryModel| most_tokens(model, usable, bounds.most());
    let without = keeping.map_or(0, most);
    let enough = bounds.most().min(bounds.max_length.max(BUSY_TOKENS));
    if without >= enough || (recomputing.is_none() && without >= bounds.max_length) {
        return Ok(Solved { tokens: rounded(without, bounds), recompute: false });
    }
    let with = recomputing.map_or(0, most);
    if with >= bounds.max_length {
        return Ok(Solved { tokens: rounded(with, bounds), recompute: true });
    }
    Err(too_small(recomputing.or(keeping), available, usable, bounds))
}

/// The largest micro-batch that fits into so many bytes, whatever an update needs; 0 if none does.
pub fn largest_that_fits(model: &MemoryModel, available: i64) -> i64 {
    most_tokens(model, usable(available), MOST_TOKENS) / STEP * STEP
}

/// The most tokens, up to `most`, that fit; 0 if none does.
fn most_tokens(model: &MemoryModel, usable: i64, most: i64) -> i64 {
    let fits = |tokens: i64| model.total(tokens) <= usable;
    if fits(most) {
        return most;
    }
    let (mut fitting, mut too_many) = (0, most);
    while too_many - fitting > 1 {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) {
            fitting = middle;
        } else {
            too_many = middle;
        }
    }
    fitting
}

/// Rounds down to what products like, but not below the longest sample, nor where the whole update fits.
fn rounded(tokens: i64, bounds: Bounds) -> i64 {
    if tokens == bounds.most() { tokens } else { (tokens / STEP * STEP).max(bounds.max_length) }
}

fn too_small(model: Option<&MemoryModel>, available: i64, usable: i64, bounds: Bounds) -> Error {
    let Some(model) = model else { return Error::failed("memory", "no model of it was given") };
    let (lasting, needed) = (model.lasting(), model.total(bounds.max_length));
    let what = format!(
        "one sample of {} tokens needs {}, of which {} is held by weights, parameters and optimizer; of {} available, {} may \
         be used",
        bounds.max_length,
        gib(needed),
        gib(lasting),
        gib(available),
        gib(usable)
    );
    let hint = if lasting >= usable {
        "not even the weights and the optimizer fit: lower lora.r, leave tables out of lora.modules_to_save, set \
         model.dtype to a half-precision one, or use a GPU with more memory"
    } else {
        "lower data.max_length or lora.r, leave tables out of lora.modules_to_save, allow train.recompute = \"auto\", or \
         use a GPU with more memory"
    };
    Error::invalid("train.micro_batch_tokens", what).hint(hint)
}
