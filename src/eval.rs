//! Evaluation: the mean negative log-likelihood over label tokens.

use std::sync::atomic::AtomicUsize;

use serde::Serialize;
use tch::Kind;

use crate::data::{Dataset, LossAverage, PackedBatch, build_batches};
use crate::error::{Result, not_stopped};
use crate::model::llama::{BatchInput, Llama};

/// Samples packed at a time.
const SAMPLES_AT_ONCE: usize = 256;

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalResult {
    /// Sum of the losses over their label tokens, divided by the number of those.
    pub eval_loss: f64,
    /// `exp(eval_loss)`.
    pub perplexity: f64,
    /// Samples.
    pub samples: u64,
    /// Label tokens.
    pub label_tokens: u64,
}

/// Evaluates a model on samples, without dropout.
///
/// # Errors
/// [`Error::Interrupted`](crate::error::Error::Interrupted) when `stop` holds the number of a signal.
pub fn evaluate(model: &Llama, dataset: &Dataset, micro_batch_tokens: usize, stop: &AtomicUsize) -> Result<EvalResult> {
    let samples: Vec<u32> = (0..dataset.len() as u32).collect();
    let (mut sum, mut label_tokens) = (0.0, 0);
    for chunk in samples.chunks(SAMPLES_AT_ONCE) {
        for packed in build_batches(dataset, chunk, LossAverage::Tokens, micro_batch_tokens) {
            not_stopped(stop, "the evaluation was not done")?;
            let nll = model.nll(&model.batch(input(&packed), None)?)?;
            sum += nll.f_sum(Kind::Double)?.f_double_value(&[])?;
            label_tokens += packed.label_tokens as u64;
        }
    }
    let eval_loss = sum / label_tokens.max(1) as f64;
    Ok(EvalResult { eval_loss, perplexity: eval_loss.exp(), samples: dataset.len() as u64, label_tokens })
}

/// A packed micro-batch as the model takes it.
pub fn input(packed: &PackedBatch) -> BatchInput<'_> {
    BatchInput {
        input_ids: &packed.input_ids,
        position_ids: &packed.position_ids,
        cu_seqlens: &packed.cu_seqlens,
        slots: &packed.slots,
        learned_rows: &packed.learned_rows,
        targets: &packed.targets,
        weights: &packed.weights,
    }
}
