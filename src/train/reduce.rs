//! Summing gradients over the ranks while backward still computes the next ones.
//!
//! The flat buffer falls into buckets: the head, the blocks from the last to the first, the embedding table. That is the
//! order in which backward completes them, and the one in which every rank hands them over, whatever it has computed.

use tch::Tensor;

use crate::comm::Communicator;
use crate::data::Dataset;
use crate::error::Result;
use crate::model::llama::Done;
use crate::model::params::{Bucket, Gradients, Layout};
use crate::torch::transfer::upload;

/// The gradients of one update on their way.
pub(super) struct Reducer<'a> {
    ranks: &'a mut dyn Communicator,
    grads: &'a Gradients,
    buckets: Vec<Bucket>,
    /// The buckets handed over.
    n_begun: usize,
    /// The rows of the embedding table that this update's samples name, on every rank the same, and their gradients.
    embed_rows: Option<(Tensor, Tensor)>,
    touched: &'a [i64],
}

impl<'a> Reducer<'a> {
    /// Hands nothing over yet. `touched` are the rows of the embedding table that can have a gradient.
    pub(super) fn new(
        ranks: &'a mut dyn Communicator,
        layout: &Layout,
        grads: &'a Gradients,
        touched: &'a [i64],
    ) -> Self {
        let buckets = if ranks.world_size() > 1 { layout.buckets() } else { Vec::new() };
        Self { ranks, grads, buckets, n_begun: 0, embed_rows: None, touched }
    }

    /// Whether other ranks wait for the rest by now.
    pub(super) fn has_begun(&self) -> bool {
        self.n_begun > 0
    }

    /// Hands over what is complete.
    pub(super) fn completed(&mut self, done: Done) -> Result<()> {
        let is_complete = |bucket: &Bucket| match (bucket, done) {
            (Bucket::Head(_), _) | (_, Done::Everything) => true,
            (Bucket::Block(layer, _), Done::Block(lowest)) => *layer >= lowest,
            _ => false,
        };
        while let Some(bucket) = self.buckets.get(self.n_begun).filter(|bucket| is_complete(bucket)).cloned() {
            self.begin(&bucket)?;
            self.n_begun += 1;
        }
        Ok(())
    }

    fn begin(&mut self, bucket: &Bucket) -> Result<()> {
        match bucket {
            Bucket::Head(range) | Bucket::Block(_, range) => {
                let flat = self.grads.flat().f_narrow(0, range.start, range.end - range.start)?;
                self.ranks.all_reduce(&flat)
            }
            Bucket::Embed(index) => {
                let table_vd = self.grads.view(*index)?;
                let ids = upload(self.touched, table_vd.device())?;
                let rows = table_vd.f_index_select(0, &ids)?;
                self.ranks.all_reduce(&rows)?;
                self.embed_rows = Some((ids, rows));
                Ok(())
            }
        }
    }

    /// Hands over the rest and waits for all of it; `numbers` are summed besides.
    pub(super) fn finish(mut self, numbers: &Tensor) -> Result<()> {
        self.completed(Done::Everything)?;
        self.ranks.all_reduce(numbers)?;
        self.ranks.wait()?;
        if let (Some((ids, rows)), Some(Bucket::Embed(index))) = (&self.embed_rows, self.buckets.last()) {
            let _ = self.grads.view(*index)?.f_index_copy_(0, ids, rows)?;
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
