//! The state of a training brought together: copies for a checkpoint, and a comparison of what the ranks hold.

use tch::{Kind, Tensor};

use crate::engine::gather::{gather, gather_number};
use crate::engine::optim::adamw::of_moment;
use crate::engine::step::Trainer;
use crate::error::{Error, Result};
use crate::model::params::named_copies;

/// Elements whose bits are summed at a time: libtorch widens all that it is given before it sums.
const SUMMED_AT_ONCE: i64 = 1 << 22;

impl Trainer {
    /// Holds the parameters of this rank against those of the other ranks: the masters where it has them all, else what its
    /// products read. Every rank must call this together.
    ///
    /// # Errors
    /// They are not the same to the last bit, on every rank.
    pub fn compare_with_other_ranks(&mut self) -> Result<()> {
        if self.ranks.world_size() == 1 {
            return Ok(());
        }
        let ours = match self.params.master() {
            Some(master) => master.shallow_clone(),
            None => self.params.compute()?,
        };
        let sums = gather_number(&mut *self.ranks, &checksum(&ours)?)?;
        let Some(other) = sums.iter().position(|sum| *sum != sums[0]) else { return Ok(()) };
        let what = format!("rank {other} has other parameters than rank 0: nothing is saved from here on");
        Err(Error::failed(format!("step {}", self.state.step), what).hint(
            "one of them has computed wrongly, or they compute differently: see that all machines have the same hardware, driver and bellora, and that their memory is sound; then go on from the newest checkpoint",
        ))
    }

    /// Copies of the parameters on the CPU by name, for the rank that asks for them. Every rank must call this together.
    pub fn copied_params(&mut self, is_wanted: bool) -> Result<Option<Vec<(String, Tensor)>>> {
        let whole = match self.params.master() {
            Some(master) => master.shallow_clone(),
            None => self.gathered(&self.params.shard_masters()?)?,
        };
        is_wanted.then(|| named_copies(self.params.layout(), &whole)).transpose()
    }

    /// Copies of the moments on the CPU by name, as [`Self::copied_params`].
    pub fn copied_moments(&mut self, is_wanted: bool) -> Result<Option<Vec<(String, Tensor)>>> {
        let mut copied = Vec::new();
        for (moment, flat) in self.optimizer.moments().map(|(moment, flat)| (moment, flat.shallow_clone())) {
            let whole = match self.params.is_sharded() {
                true => self.gathered(&self.params.shard().of_packed(&flat)?)?,
                false => flat,
            };
            if is_wanted {
                copied.extend(of_moment(moment, named_copies(self.params.layout(), &whole)?));
            }
        }
        Ok(is_wanted.then_some(copied))
    }

    /// A buffer of all parameters, of which every rank gives its shard. It lies where the gradients do, which are of no use
    /// between two steps.
    fn gathered(&mut self, shard: &[Tensor]) -> Result<Tensor> {
        let whole = self.grads.flat().shallow_clone();
        for (mut ours, given) in self.params.shard().of_whole(&whole)?.into_iter().zip(shard) {
            ours.f_copy_(given)?;
        }
        gather(&mut *self.ranks, &self.params, &whole)?;
        Ok(whole)
    }
}

/// The sum of the bits of a flat buffer, taken as whole numbers: the same in whatever order they are added up.
fn checksum(flat: &Tensor) -> Result<Tensor> {
    let kind = if flat.kind() == Kind::Float { Kind::Int } else { Kind::Int16 };
    let total = Tensor::f_zeros([0i64; 0], (Kind::Int64, flat.device()))?;
    for piece in flat.f_view_dtype(kind)?.f_split(SUMMED_AT_ONCE, 0)? {
        let _ = total.shallow_clone().f_add_(&piece.f_sum(Kind::Int64)?)?;
    }
    Ok(total)
}
