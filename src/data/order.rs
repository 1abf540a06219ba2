//! The order of samples: which of them an update is made of.
//!
//! Update `s` of an epoch takes the samples `[s * global_batch, (s + 1) * global_batch)` of that epoch's order, the
//! last update what is left. Nothing else defines it: neither ranks nor packing.

use std::ops::Range;

/// SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
///
/// Orders made with it are part of what a seed means, so it never changes.
pub(super) struct SplitMix64(pub(super) u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, each equally likely: draws above the highest multiple of `n` are thrown away.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        let beyond = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.next();
            if draw < beyond {
                return draw % n;
            }
        }
    }
}

/// The numbers below `n` in an order that `seed` and `stream` define: Fisher-Yates from the end, drawing from
/// SplitMix64. The generator starts at the first output for `seed`, plus `stream` times an odd constant.
pub(super) fn permutation(n: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut generator = SplitMix64(seed);
    let mut generator = SplitMix64(generator.next().wrapping_add(stream.wrapping_mul(0xD1B5_4A32_D192_ED03)));
    let mut order: Vec<u32> = (0u32..).take(n).collect();
    for last in (1..n).rev() {
        order.swap(last, generator.below(last as u64 + 1) as usize);
    }
    order
}

/// The samples of every update. It keeps the current epoch's order, four bytes a sample.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    n_samples: usize,
    global_batch: usize,
    shuffle: bool,
    seed: u64,
    current: Option<(u64, Vec<u32>)>,
}

impl EpochOrder {
    /// Takes the number of samples, samples an update, whether each epoch is shuffled (else file order) and the seed.
    ///
    /// # Panics
    /// If there are no samples or an update takes none: a loaded data set and a resolved config never say so.
    pub fn new(n_samples: usize, global_batch: usize, shuffle: bool, seed: u64) -> Self {
        assert!(n_samples > 0 && global_batch > 0, "an order of {n_samples} samples, {global_batch} an update");
        Self { n_samples, global_batch, shuffle, seed, current: None }
    }

    /// Updates an epoch: the last may have fewer samples than the others.
    pub fn updates_per_epoch(&self) -> u64 {
        self.n_samples.div_ceil(self.global_batch) as u64
    }

    /// The samples of an update, counted from 0 over all epochs, as indices into the data set.
    pub fn step_samples(&mut self, step: u64) -> Vec<u32> {
        let (epoch, within) = (step / self.updates_per_epoch(), step % self.updates_per_epoch());
        let start = within as usize * self.global_batch;
        let range: Range<usize> = start..self.n_samples.min(start + self.global_batch);
        if !self.shuffle {
            return (0u32..).take(range.end).skip(range.start).collect();
        }
        match &self.current {
            Some((at, order)) if *at == epoch => order[range].to_vec(),
            _ => {
                let order = permutation(self.n_samples, self.seed, epoch);
                let samples = order[range].to_vec();
                self.current = Some((epoch, order));
                samples
            }
        }
    }
}

/// Splits `n_samples` samples into training and validation, each in file order. The share is rounded; both sides get
/// at least one sample where there are two, and a share of 0 leaves validation empty.
pub fn split(n_samples: usize, validation_fraction: f64, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let wanted = (n_samples as f64 * validation_fraction).round() as usize;
    let n_validation = if validation_fraction > 0.0 && n_samples > 1 { wanted.clamp(1, n_samples - 1) } else { 0 };
    // A stream that no epoch reaches.
    let mut order = permutation(n_samples, seed, u64::MAX);
    let mut train = order.split_off(n_validation);
    order.sort_unstable();
    train.sort_unstable();
    (train, order)
}
