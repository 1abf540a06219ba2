//! How large micro-batches are where the machine is to say it: as large as its memory holds by the memory model.

use crate::config::{Auto, Config, Recompute};
use crate::error::Result;
use crate::model::config::LlamaConfig;
use crate::model::lora::LoraSpec;
use crate::model::params::Layout;
use crate::plan::MemoryModel;
use crate::plan::solve::{Bounds, Solved, largest_micro_batch, usable};
use crate::train::setup::{device, kind};

/// Settles the size of micro-batches and recompute where `asked` leaves them to the machine, for `available` bytes of
/// memory. `config` is `asked` with everything else settled.
///
/// # Errors
/// [`Error::Invalid`](crate::error::Error::Invalid) when not even the longest sample fits.
pub fn settle_micro_batch(
    config: &mut Config,
    asked: &Config,
    shape: &LlamaConfig,
    lora: &LoraSpec,
    layout: &Layout,
    available: u64,
) -> Result<()> {
    let available = i64::try_from(available).unwrap_or(i64::MAX);
    let model = |recompute| MemoryModel::new(shape, lora, layout, kind(config), device(config), recompute);
    let may_keep = asked.train.recompute != Auto::Is(Recompute::All);
    let may_recompute = asked.train.recompute != Auto::Is(Recompute::Nothing);
    let solved = match asked.train.micro_batch_tokens {
        Auto::Is(tokens) => {
            let fits = model(false).total(tokens as i64) <= usable(available);
            Solved { tokens: tokens as i64, recompute: may_recompute && !(may_keep && fits) }
        }
        Auto::Auto => {
            let max_length = config.data.max_length as i64;
            let update = max_length.saturating_mul(config.train.global_batch as i64);
            let (keeping, recomputing) = (may_keep.then(|| model(false)), may_recompute.then(|| model(true)));
            let bounds = Bounds { max_length, update };
            largest_micro_batch(keeping.as_ref(), recomputing.as_ref(), available, bounds)?
        }
    };
    config.train.micro_batch_tokens = Auto::Is(solved.tokens as usize);
    config.train.recompute = Auto::Is(if solved.recompute { Recompute::All } else { Recompute::Nothing });
    Ok(())
}
