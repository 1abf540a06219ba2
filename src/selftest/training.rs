//! A tiny training run on the device, in each of its dtypes, against the same run on the CPU with products in fp64.
//!
//! The model is made in the process: three blocks of grouped attention, a vocabulary that is no multiple of 64, biases and
//! adapters on all seven projections, norms of the heads, both tables trained, dropout. The samples are ragged, and an update takes several micro-batches.

use std::collections::BTreeMap;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::data::lengths::Length;
use crate::data::{Dataset, LossAverage};
use crate::engine::optim::adamw::{AdamW, AdamWConfig};
use crate::engine::optim::loss_scale::LossScale;
use crate::engine::optim::schedule::{LrSchedule, Shape};
use crate::engine::state::TrainState;
use crate::engine::step::{StepSettings, Trainer};
use crate::error::{Error, Result};
use crate::model::decoder::{Compute, Decoder};
use crate::model::init::{NewRows, initialise};
use crate::model::lora::LoraSpec;
use crate::model::params::{Layout, ParamBuffer};
use crate::model::shape::{ModelShape, Projection, Table};
use crate::model::weights::BaseWeights;
use crate::ops::rope::RopeScaling;
use crate::selftest::judge::{Row, unit_roundoff};
use crate::torch::cuda::set_numerics;
use crate::torch::dtype;
use crate::torch::number::WithNumber;

/// Steps of the run: enough that what AdamW wrote in the first is read, and read again.
const N_STEPS: u64 = 8;
const SAMPLES_AN_UPDATE: usize = 8;
const LONGEST: u32 = 70;
const VOCABULARY: i64 = 331;
const SEED: u64 = 7;
/// The losses against the judge's.
const LOSSES: &str = "training losses";
/// The losses of two runs with `train.deterministic` against each other.
const REPEATED: &str = "training repeated";

/// The losses of a tiny run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingCurve {
    /// What the products were computed in; fp64 is the judge.
    pub dtype: &'static str,
    /// The loss of every step.
    pub losses: Vec<f64>,
}

/// Trains in each dtype on a device, and once in fp64 on the CPU as their judge; then twice with deterministic ops, whose
/// losses may not differ in a single bit.
pub(super) fn try_all(kinds: &[Kind], device: Device) -> Result<(Vec<TrainingCurve>, Vec<Row>)> {
    let judge = losses(Kind::Double, Device::Cpu)?;
    let mut curves = vec![TrainingCurve { dtype: dtype::name(Kind::Double), losses: judge.clone() }];
    let mut rows = Vec::new();
    for &kind in kinds {
        match losses(kind, device) {
            Ok(losses) => {
                rows.push(Row::new(LOSSES, kind, largest_share(&losses, &judge), tolerance(kind)));
                curves.push(TrainingCurve { dtype: dtype::name(kind), losses });
            }
            Err(error) => rows.push(Row::without_result(LOSSES, kind, error.to_string())),
        }
        set_numerics(true)?;
        let twice = losses(kind, device).and_then(|first| Ok((first, losses(kind, device)?)));
        set_numerics(false)?;
        rows.push(match twice {
            Ok((first, second)) if largest_share(&first, &judge) <= tolerance(kind) => {
                Row::new(REPEATED, kind, largest_share(&second, &first), 0.0)
            }
            Ok(_) => Row::without_result(REPEATED, kind, "deterministic ops give other losses".into()),
            Err(error) => Row::without_result(REPEATED, kind, error.to_string()),
        });
    }
    Ok((curves, rows))
}

/// How far the losses may stray from the judge's, as a share of them.
///
/// A loss is the mean over some hundred tokens, so that the errors of single activations cancel: in half precision it stays
/// within one rounding. In fp32 the products' sums, of up to 176 terms, weigh more than the roundings of results, and a
/// few of those are allowed. What is wrong in substance (a mask, a position, a scale) changes losses in the third digit or before.
fn tolerance(kind: Kind) -> f64 {
    unit_roundoff(kind) * if kind == Kind::Float { 16.0 } else { 1.0 }
}

/// The largest difference of two curves as a share of the judge's loss at that step.
fn largest_share(ours: &[f64], judge: &[f64]) -> f64 {
    if ours.len() != judge.len() {
        return f64::INFINITY;
    }
    let share = |(ours, judge): (&f64, &f64)| ((ours - judge) / judge).abs();
    // Of a NaN and a number the maximum is the number, which would hide it.
    let finite = |share: f64| if share.is_finite() { share } else { f64::INFINITY };
    ours.iter().zip(judge).map(share).map(finite).fold(0.0, f64::max)
}

/// The losses of the run in a dtype on a device.
///
/// # Errors
/// A step that could not be done, or was skipped.
fn losses(kind: Kind, device: Device) -> Result<Vec<f64>> {
    let mut trainer = trainer(kind, device)?;
    let mut steps = Vec::new();
    for _ in 0..N_STEPS {
        steps.extend(trainer.step()?);
    }
    steps.extend(trainer.finish()?);
    steps
        .iter()
        .map(|step| match step.loss {
            Some(loss) if !step.skipped => Ok(loss),
            _ => Err(Error::failed(format!("step {}", step.step), "the update was skipped, for it overflowed")),
        })
        .collect()
}

fn trainer(kind: Kind, device: Device) -> Result<Trainer> {
    let (shape, lora) = (shape(), lora());
    let tensors = tensors(&shape)?;
    let base = BaseWeights::Memory(&tensors);
    let mut params = ParamBuffer::new(Layout::new(&shape, &lora, VOCABULARY), kind, device)?;
    initialise(&mut params, &shape, &lora, base, NewRows::Normal, SEED)?;
    let compute = Compute { kind, device, max_positions: i64::from(LONGEST) };
    let model = Decoder::load(&shape, base, &lora, &params, compute)?;
    let adamw = AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };
    let optimizer = AdamW::new(adamw, &params)?;
    let settings = StepSettings {
        seed: SEED,
        global_batch: SAMPLES_AN_UPDATE,
        shuffle: true,
        micro_batch_tokens: 2 * LONGEST as usize,
        recompute: false,
        loss_average: LossAverage::Tokens,
        dropout: lora.dropout,
        max_grad_norm: 1.0,
        max_non_finite: 0,
        schedule: LrSchedule { learning_rate: 3e-3, shape: Shape::Cosine, warmup: 1, total: N_STEPS },
    };
    Trainer::new(settings, samples(), model, params, optimizer, TrainState::start(LossScale::of(kind)))
}

/// Samples of 2 to 70 tokens, of which from one to nearly all are learned.
fn samples() -> Dataset {
    let lengths: Vec<Length> = (0..3 * SAMPLES_AN_UPDATE as u32)
        .map(|i| {
            let tokens = 2 + i * i * 11 % (LONGEST - 1);
            Length { tokens, learned: 1 + i * 17 % (tokens - 1) }
        })
        .collect();
    Dataset::random(&lengths, VOCABULARY as u32, SEED)
}

fn shape() -> ModelShape {
    ModelShape {
        model_type: "llama",
        hidden_size: 64,
        intermediate_size: 176,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        vocab_size: VOCABULARY,
        rms_norm_eps: 1e-5,
        max_position_embeddings: i64::from(LONGEST),
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        attention_dropout: 0.0,
        initializer_range: 0.1,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        biases: Projection::ALL.to_vec(),
        has_head_norms: true,
        sliding_window: None,
    }
}

fn lora() -> LoraSpec {
    LoraSpec {
        r: 8,
        alpha: 16.0,
        dropout: 0.1,
        use_rslora: false,
        target_modules: Projection::ALL.to_vec(),
        modules_to_save: Table::ALL.to_vec(),
    }
}

/// The base: drawn on the CPU, so that it is the same for every device, and in bf16, so that rounding it to another dtype
/// changes next to nothing.
fn tensors(shape: &ModelShape) -> Result<BTreeMap<String, Tensor>> {
    tch::manual_seed(SEED as i64);
    let draw = |dims: &[i64], mean: f64, std: f64| -> Result<Tensor> {
        let drawn = Tensor::f_randn(dims, (Kind::Float, Device::Cpu))?.f_times(std)?.f_plus(mean)?;
        Ok(drawn.f_to_kind(Kind::BFloat16)?)
    };
    let draw = |(name, dims): (String, Vec<i64>)| {
        let (mean, std) = if name.ends_with("norm.weight") { (1.0, 0.2) } else { (0.0, shape.initializer_range) };
        Ok((name, draw(&dims, mean, std)?))
    };
    shape.tensors().into_iter().map(draw).collect()
}
