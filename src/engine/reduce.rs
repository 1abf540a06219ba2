//! Summing gradients over the ranks while backward still computes the next ones.
//!
//! The flat buffer falls into buckets. Backward completes them from the last to the first, and in that order every rank
//! hands them over, whatever it has computed. Where each rank updates a shard, it gets the sums of that alone, and what it has
//! made of them is gathered afterwards (`gather`).

use tch::Tensor;

use crate::comm::Communicator;
use crate::data::Dataset;
use crate::error::Result;
use crate::model::decoder::Done;
use crate::model::params::{Bucket, Gradients, Holds, ParamBuffer};
use crate::torch::transfer::upload;

/// The gradients of one update on their way.
pub(super) struct Reducer<'a> {
    ranks: &'a mut dyn Communicator,
    grads: &'a Gradients,
    is_sharded: bool,
    /// The buckets that remain to be handed over, the next one last.
    remaining: &'a [Bucket],
    /// The rows of the embedding table that this update's samples name, on every rank the same.
    touched: &'a [i64],
    /// Their gradients: where they belong, which rows, the sums.
    embed: Option<(Tensor, Tensor, Tensor)>,
}

impl<'a> Reducer<'a> {
    /// Hands nothing over yet. `touched` are the rows of the embedding table that can have a gradient.
    pub(super) fn new(
        ranks: &'a mut dyn Communicator,
        params: &'a ParamBuffer,
        grads: &'a Gradients,
        touched: &'a [i64],
    ) -> Self {
        let remaining = if ranks.world_size() > 1 { params.layout().buckets() } else { &[] };
        Self { ranks, grads, is_sharded: params.is_sharded(), remaining, touched, embed: None }
    }

    /// Hands over what is complete.
    pub(super) fn completed(&mut self, done: Done) -> Result<()> {
        let is_complete = |holds: Holds| match (holds, done) {
            (Holds::Head, _) | (_, Done::Everything) => true,
            (Holds::Block(layer), Done::Block(lowest)) => layer >= lowest,
            _ => false,
        };
        while let Some((bucket, rest)) = self.remaining.split_last().filter(|(last, _)| is_complete(last.holds)) {
            self.begin(bucket)?;
            self.remaining = rest;
        }
        Ok(())
    }

    fn begin(&mut self, Bucket { holds, range }: &Bucket) -> Result<()> {
        let flat = self.grads.flat().f_narrow(0, range.start, range.end - range.start)?;
        match holds {
            // So few rows that sharing them out would save little.
            Holds::Embed => {
                // The table stands first of all tensors.
                let table_vd = self.grads.view(0)?;
                let ids = upload(self.touched, table_vd.device())?;
                let rows = table_vd.f_index_select(0, &ids)?;
                self.ranks.all_reduce(&rows)?;
                self.embed = Some((table_vd, ids, rows));
                Ok(())
            }
            _ if self.is_sharded => self.ranks.reduce_scatter(&flat),
            _ => self.ranks.all_reduce(&flat),
        }
    }

    /// Hands over the rest, complete or not, and waits for all of it; `numbers` are summed besides.
    pub(super) fn finish(mut self, numbers: Option<&Tensor>) -> Result<()> {
        self.completed(Done::Everything)?;
        if let Some(numbers) = numbers {
            self.ranks.all_reduce(numbers)?;
        }
        self.ranks.wait()?;
        if let Some((mut table_vd, ids, rows)) = self.embed {
            let _ = table_vd.f_index_copy_(0, &ids, &rows)?;
        }
        Ok(())
    }
}

/// The ids that occur in samples, each once, in order.
pub(super) fn touched_ids(dataset: &Dataset, samples: &[u32]) -> Vec<i64> {
    let mut ids: Vec<i64> =
        samples.iter().flat_map(|&sample| dataset.ids(sample as usize).iter().map(|&id| i64::from(id))).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
