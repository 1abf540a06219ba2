//! The micro-batches of an update, from its samples.

use super::dataset::Dataset;
use super::pack::{micro_batches, share};
use crate::batch::PackedBatch;
use crate::choice::Choice;

/// How the losses of an update's tokens are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossAverage {
    /// Over all label tokens of the update.
    Tokens,
    /// Within groups of this many consecutive samples of the update, then over the groups that have label tokens.
    Samples {
        /// Samples a group; the last group of an update may have fewer.
        group: usize,
    },
}

impl Choice for LossAverage {
    const WORDS: &'static [(&'static str, Self)] = &[("tokens", Self::Tokens), ("samples", Self::Samples { group: 1 })];

    fn as_str(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Samples { .. } => "samples",
        }
    }
}

/// Which part of an update a process computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Of the process, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub world_size: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, world_size: 1 };
}

/// Builds the micro-batches of one update from its samples, in the order that defines it. Samples with nothing to learn
/// are left out but keep their slots; an update without any label token has no micro-batches.
pub fn build_batches(dataset: &Dataset, samples: &[u32], average: LossAverage, max_tokens: usize) -> Vec<PackedBatch> {
    build_share(dataset, samples, average, max_tokens, Share::WHOLE)
}

/// Does as [`build_batches`] for the samples that fall to one of several processes; there may be none. Slots and weights are
/// those that the samples have in the update as a whole.
pub fn build_share(
    dataset: &Dataset,
    samples: &[u32],
    average: LossAverage,
    max_tokens: usize,
    of: Share,
) -> Vec<PackedBatch> {
    let labels: Vec<usize> = samples.iter().map(|&sample| dataset.label_tokens(sample as usize)).collect();
    let weights = sample_weights(&labels, average);
    let slots: Vec<usize> = (0..samples.len()).filter(|&slot| labels[slot] > 0).collect();
    let length = |slot: &usize| dataset.ids(samples[*slot] as usize).len();
    let own = share(&slots.iter().map(length).collect::<Vec<_>>(), of.rank, of.world_size);
    let slots: Vec<usize> = own.into_iter().map(|document| slots[document]).collect();
    let lengths: Vec<usize> = slots.iter().map(length).collect();
    micro_batches(&lengths, max_tokens)
        .into_iter()
        .map(|documents| {
            let n_tokens = documents.iter().map(|&document| lengths[document]).sum();
            let mut batch = PackedBatch::with_capacity(n_tokens, documents.len());
            for document in documents {
                let slot = slots[document];
                push(&mut batch, dataset, samples[slot] as usize, slot, weights[slot]);
            }
            batch
        })
        .collect()
}

/// The weight of each label token of each sample, from the samples' numbers of label tokens.
fn sample_weights(labels: &[usize], average: LossAverage) -> Vec<f32> {
    let group = match average {
        LossAverage::Tokens => labels.len(),
        LossAverage::Samples { group } => group,
    };
    let groups = labels.chunks(group.max(1));
    let sums: Vec<usize> = groups.clone().map(|group| group.iter().sum()).collect();
    let valid = sums.iter().filter(|&&sum| sum > 0).count();
    groups
        .zip(sums)
        .flat_map(|(group, sum)| {
            let weight = if sum > 0 { (1.0 / (valid as f64 * sum as f64)) as f32 } else { 0.0 };
            std::iter::repeat_n(weight, group.len())
        })
        .collect()
}

/// Puts a document behind the others of a micro-batch.
fn push(batch: &mut PackedBatch, dataset: &Dataset, sample: usize, slot: usize, weight: f32) {
    let ids = dataset.ids(sample);
    let start = batch.input_ids.len();
    batch.input_ids.extend(ids.iter().map(|&id| i64::from(id)));
    batch.position_ids.extend(0..ids.len() as i64);
    batch.cu_seqlens.push(batch.input_ids.len());
    batch.slots.push(slot as u64);
    // The first token has no row before it that could predict it.
    for at in dataset.learned(sample) {
        batch.learned_rows.push((start + at - 1) as i64);
        batch.targets.push(i64::from(ids[at]));
    }
    batch.weights.resize(batch.targets.len(), weight);
}
