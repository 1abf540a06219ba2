//! Evaluation: the mean negative log-likelihood over label tokens.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use tch::{Device, Kind};

use crate::comm::Communicator;
use crate::data::{Dataset, LossAverage, build_batches};
use crate::error::{Error, Result, STOP_SIGNALS};
use crate::model::decoder::Decoder;
use crate::progress::Work;
use crate::torch::transfer;

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

/// Evaluates a model on samples, without dropout; each rank takes a share of them.
///
/// # Errors
/// [`Error::Interrupted`] on every rank when `stop` holds the number of a signal on one.
pub fn evaluate(
    model: &Decoder,
    dataset: &Dataset,
    micro_batch_tokens: usize,
    ranks: &mut dyn Communicator,
    stop: &AtomicUsize,
) -> Result<EvalResult> {
    // Samples are shared out, not batches: ranks need not agree on the size of these.
    let samples: Vec<u32> = (ranks.rank() as u32..dataset.len() as u32).step_by(ranks.world_size()).collect();
    let (mut sum, mut label_tokens) = (0.0, 0);
    let batches = samples
        .chunks(SAMPLES_AT_ONCE)
        .flat_map(|chunk| build_batches(dataset, chunk, LossAverage::Tokens, micro_batch_tokens));
    let work = Work::begin("evaluating", "samples", samples.len() as u64);
    for packed in batches {
        if stop.load(Ordering::SeqCst) != 0 {
            break;
        }
        let nll = model.nll(&model.batch(&packed, None)?)?;
        sum += nll.f_sum(Kind::Double)?.f_double_value(&[])?;
        label_tokens += packed.label_tokens() as u64;
        work.advance(packed.slots.len() as u64);
    }
    let signal = stop.load(Ordering::SeqCst);
    let signals = STOP_SIGNALS.map(|known| f64::from(u8::from(known == signal)));
    let numbers = [&[sum, label_tokens as f64][..], &signals].concat();
    let shared = transfer::upload(&numbers, model.device())?;
    ranks.all_reduce(&shared)?;
    ranks.wait()?;
    let numbers = Vec::<f64>::try_from(shared.f_to_device(Device::Cpu)?)?;
    let stopped = STOP_SIGNALS.into_iter().zip(&numbers[2..]).find(|(_, ranks)| **ranks > 0.0);
    if let Some((signal, _)) = stopped {
        return Err(Error::Interrupted { signal: signal as i32, note: "the evaluation was not done".to_owned() });
    }
    let (sum, label_tokens) = (numbers[0], numbers[1] as u64);
    let eval_loss = sum / label_tokens.max(1) as f64;
    Ok(EvalResult { eval_loss, perplexity: eval_loss.exp(), samples: dataset.len() as u64, label_tokens })
}
