//! One synthetic micro-batch before the first step: does the memory model tell the truth on this device?
//!
//! It has the size that the run's micro-batches may have, documents of the greatest length, and every position learned:
//! no micro-batch of the run will need more. What the device's allocator hands out for it stays with the program, so that
//! nothing grows afterwards.

use tch::Device;

use crate::batch::PackedBatch;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::params::Gradients;
use crate::ops::cross_entropy::ScaledLoss;
use crate::ops::dropout::DropoutKey;
use crate::torch::memory;

/// The micro-batch to try.
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    /// Exactly so many tokens.
    pub tokens: usize,
    /// Documents have so many, the last one what is left.
    pub max_length: usize,
    /// Whether activations are computed again in backward.
    pub recompute: bool,
    /// The run's dropout.
    pub dropout: f64,
}

/// What was predicted and what was found, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What it is.
    pub name: &'static str,
    /// By the memory model.
    pub predicted: i64,
    /// By the device's allocator; on the CPU the memory resident.
    pub real: i64,
}

/// What a memory model expects of a micro-batch, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Held before the micro-batch comes: weights, parameters, gradients, moments.
    pub lasting: i64,
    /// Held between forward and the head.
    pub kept: i64,
    /// The peak of forward.
    pub forward: i64,
    /// The peak of the head with its loss and gradient.
    pub head: i64,
    /// The peak of backward.
    pub backward: i64,
}

/// A memory model: what it expects of a micro-batch of so many tokens.
pub type Predict<'a> = &'a dyn Fn(usize) -> Expected;

/// The outcome of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// Tokens of the micro-batch.
    pub tokens: i64,
    /// What was held before it, what was kept for backward, and the peak of each pass.
    pub found: Vec<Found>,
}

impl Probed {
    /// The peak over all passes.
    pub fn peak(&self) -> Found {
        let largest = |value: fn(&Found) -> i64| self.found.iter().map(value).max().unwrap_or_default();
        Found { name: "peak", predicted: largest(|f| f.predicted), real: largest(|f| f.real) }
    }
}

/// Runs the micro-batch forward, through the head and back, and measures.
///
/// Parameters, moments and the run's state are not touched; the gradients come out zero.
///
/// # Errors
/// Memory that runs out ([`Error::is_out_of_memory`]), like any other fault of libtorch.
pub fn probe(
    model: &Decoder,
    grads: &mut Gradients,
    predict: Predict<'_>,
    trial: Trial,
    device: Device,
) -> Result<Probed> {
    let outcome = passes(model, grads, predict(trial.tokens), trial, device);
    grads.zero()?;
    outcome
}

fn passes(model: &Decoder, grads: &Gradients, expected: Expected, trial: Trial, device: Device) -> Result<Probed> {
    let mut found = Vec::new();
    let now = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let in_use = || -> Result<i64> {
        memory::synchronize(device)?;
        Ok(now(memory::in_use_bytes(device)?))
    };
    let peak = || -> Result<i64> {
        memory::synchronize(device)?;
        let peak = now(memory::peak_bytes(device)?);
        memory::reset_peak(device)?;
        Ok(peak)
    };

    found.push(Found { name: "held before", predicted: expected.lasting, real: in_use()? });
    let packed = synthetic(trial, model.config().vocab_size)?;
    let dropout = (trial.dropout > 0.0).then_some(DropoutKey { p: trial.dropout, seed: 0, step: 0 });
    let loss = ScaledLoss::new(1.0, device)?;
    memory::reset_peak(device)?;
    let batch = model.batch(&packed, dropout)?;

    let (hidden_nd, saved) = model.forward(&batch, trial.recompute)?;
    let forward = peak()?;
    let kept = in_use()?;
    let dhidden_nd = model.head_loss(&hidden_nd, &batch, grads, &loss)?;
    drop(hidden_nd);
    let head = peak()?;
    model.backward(saved, dhidden_nd, &batch, grads, &mut |_| Ok(()))?;
    let backward = peak()?;

    found.extend([
        Found { name: "kept for backward", predicted: expected.kept, real: kept },
        Found { name: "peak of forward", predicted: expected.forward, real: forward },
        Found { name: "peak of the head", predicted: expected.head, real: head },
        Found { name: "peak of backward", predicted: expected.backward, real: backward },
    ]);
    Ok(Probed { tokens: trial.tokens as i64, found })
}

/// A micro-batch of that size.
fn synthetic(trial: Trial, vocab_size: i64) -> Result<PackedBatch> {
    let Trial { tokens, max_length, .. } = trial;
    if tokens == 0 || max_length == 0 {
        return Err(Error::failed("memory", format!("no micro-batch of {tokens} tokens can be tried")));
    }
    let starts = (0..tokens).step_by(max_length);
    let mut cu_seqlens: Vec<usize> = starts.collect();
    let slots = (0..cu_seqlens.len() as u64).collect();
    cu_seqlens.push(tokens);
    // Any ids will do, as long as they are spread over the table.
    let id = |row: usize| (row as i64 * 7919 + 1) % vocab_size;
    let position_ids: Vec<i64> = (0..tokens).map(|row| (row % max_length) as i64).collect();
    // The last row of a document has no next token.
    let is_learned = |row: &usize| row + 1 < tokens && position_ids[row + 1] > 0;
    let learned: Vec<usize> = (0..tokens).filter(is_learned).collect();
    Ok(PackedBatch {
        input_ids: (0..tokens).map(id).collect(),
        cu_seqlens,
        slots,
        learned_rows: learned.iter().map(|&row| row as i64).collect(),
        targets: learned.iter().map(|&row| id(row + 1)).collect(),
        weights: vec![1.0 / tokens as f32; learned.len()],
        position_ids,
    })
}
