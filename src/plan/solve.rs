//! From bytes to tokens: the largest micro-batch that a device can hold.

use crate::error::{Error, Result};
use crate::plan::fit::gib;
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

/// What may be given up for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Form {
    /// Whether the blocks' activations are computed again in backward.
    pub recompute: bool,
    /// Whether each rank holds a part of the optimizer's state only.
    pub shard: bool,
}

/// What a device can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Solved {
    /// Tokens of a micro-batch.
    pub tokens: i64,
    /// What they cost.
    pub form: Form,
}

/// The bounds of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// `data.max_length`: one sample must fit.
    pub max_length: i64,
    /// Samples of an update on each device: more of that length are never needed.
    pub samples: i64,
}

impl Bounds {
    fn most(&self) -> i64 {
        self.samples.saturating_mul(self.max_length).clamp(self.max_length, MOST_TOKENS.max(self.max_length))
    }
}

/// What a run may use of so many bytes; the rest is the margin.
pub fn usable(available: i64) -> i64 {
    available - available / MARGIN
}

/// What the user has settled of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Its tokens.
    pub tokens: Option<i64>,
    /// Whether activations are computed again.
    pub recompute: Option<bool>,
    /// Whether the optimizer's state is sharded.
    pub shard: Option<bool>,
}

impl Wanted {
    /// The forms that are left to choose from, from the quickest to the one that needs the least memory. Sharding costs a
    /// gathering of all parameters in every update; recompute makes a step half as long again.
    fn forms(&self, n_ranks: usize) -> Vec<Form> {
        let shards = match self.shard {
            Some(given) => vec![given && n_ranks > 1],
            None if n_ranks > 1 => vec![false, true],
            None => vec![false],
        };
        let recomputes = self.recompute.map_or(vec![false, true], |given| vec![given]);
        let with = |recompute: bool| shards.iter().map(move |&shard| Form { recompute, shard });
        recomputes.into_iter().flat_map(with).collect()
    }
}

/// Settles the rest for a device with `available` bytes, weights and parameters included, less the margin; `model` is the
/// memory of the run in each form.
///
/// A micro-batch that is given takes the first form in which it fits. Else it is the largest that fits in the first form in
/// which it is large enough: memory is saved only where without that not even [`BUSY_TOKENS`] fit, or not the longest
/// sample, or (if that is less) not a whole update.
///
/// # Errors
/// [`Error::Invalid`] when the longest sample does not fit in any form and the size is not given, with the numbers and what
/// to lower.
pub fn settle(
    model: impl Fn(Form) -> MemoryModel,
    wanted: Wanted,
    n_ranks: usize,
    available: i64,
    bounds: Bounds,
) -> Result<Solved> {
    let usable = usable(available);
    let mut forms: Vec<(Form, MemoryModel)> =
        wanted.forms(n_ranks).into_iter().map(|form| (form, model(form))).collect();
    let Some((least, smallest)) = forms.pop() else { return Err(Error::failed("memory", "no form of it was given")) };
    if let Some(tokens) = wanted.tokens {
        let fitting = forms.iter().find(|(_, model)| model.total(tokens) <= usable);
        return Ok(Solved { tokens, form: fitting.map_or(least, |(form, _)| *form) });
    }
    let most = |model: &MemoryModel| most_tokens(model, usable, bounds.most());
    let enough = bounds.most().min(bounds.max_length.max(BUSY_TOKENS));
    for (form, model) in &forms {
        let tokens = most(model);
        if tokens >= enough {
            return Ok(Solved { tokens: rounded(tokens, bounds), form: *form });
        }
    }
    let tokens = most(&smallest);
    if tokens >= bounds.max_length {
        return Ok(Solved { tokens: rounded(tokens, bounds), form: least });
    }
    Err(too_small(&smallest, available, usable, bounds))
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

fn too_small(model: &MemoryModel, available: i64, usable: i64, bounds: Bounds) -> Error {
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
