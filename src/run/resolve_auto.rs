//! What a config leaves to the machine: device, dtype, the size of micro-batches, recompute, sharding.

use tch::{Device, Kind};

use crate::checkpoint::save::BYTES_PER_PARAM;
use crate::config::{self, Auto, Config};
use crate::data::{Answers, Prompting};
use crate::device::{self, BF16_CAPABILITY, Cuda};
use crate::error::{Error, Result};
use crate::model::lora::LoraSpec;
use crate::model::params::Layout;
use crate::model::shape::ModelShape;
use crate::plan::MemoryModel;
use crate::plan::solve::{self, Bounds, Form, Solved, Wanted};
use crate::torch::memory;

/// Micro-batches on a CPU hold this many tokens where the config says `auto`.
pub(super) const CPU_MICRO_BATCH_TOKENS: usize = 4096;

/// The dtype of weights, activations and products of a settled config.
pub fn kind(config: &Config) -> Kind {
    match config.model.dtype {
        Auto::Is(config::Dtype::Bf16) => Kind::BFloat16,
        Auto::Is(config::Dtype::Fp16) => Kind::Half,
        Auto::Is(config::Dtype::Fp32) | Auto::Auto => Kind::Float,
    }
}

/// Where a settled config computes.
pub fn device(config: &Config) -> Device {
    if config.model.device == Auto::Is(config::Device::Cuda) { Device::Cuda(0) } else { Device::Cpu }
}

/// Settles device and dtype where they are `auto`; gives what is worth a word about the device.
pub fn device_and_dtype(config: &mut Config) -> Result<Option<String>> {
    let note = resolve_device(config)?;
    resolve_dtype(config)?;
    Ok(note)
}

/// Settles the size of micro-batches, recompute and sharding where they are `auto`: on a CPU a fixed size where that fits
/// into memory and else a part of it, on a GPU by the memory model and the memory that is free. Sharding stays `auto` on one rank, where there is
/// nothing to choose.
///
/// # Errors
/// A GPU that has no room for a sample of `data.max_length`.
pub fn micro_batches(
    config: &mut Config,
    base: &ModelShape,
    lora: &LoraSpec,
    layout: &Layout,
    n_ranks: usize,
) -> Result<()> {
    let (device, kind, max_length) = (device(config), kind(config), config.data.max_length);
    let (tokens, shard) = (config.train.micro_batch_tokens.settled(), config.train.shard.settled());
    let recompute = config.train.recompute.settled().map(|which| which == config::Recompute::All);
    let model = |form: Form| {
        let model = MemoryModel::new(base, lora, layout, kind, device, form.recompute);
        if form.shard { model.sharded(n_ranks) } else { model }
    };
    let solved = match device.is_cuda() {
        false => {
            let form = Form { recompute: recompute == Some(true), shard: shard == Some(true) };
            let tokens = match tokens {
                Some(given) => given,
                None => most_on_cpu(&model(form), copied_bytes(config, layout), max_length)?,
            };
            Solved { tokens: tokens as i64, form }
        }
        true => {
            let wanted =
                Wanted { tokens: tokens.map(|tokens| tokens as i64), recompute, shard: shard.filter(|_| n_ranks > 1) };
            let samples = config.train.global_batch.div_ceil(n_ranks) as i64;
            let bounds = Bounds { max_length: max_length as i64, samples };
            solve::settle(model, wanted, n_ranks, memory::free_bytes(device)? as i64, bounds)?
        }
    };
    config.train.micro_batch_tokens = Auto::Is(solved.tokens as usize);
    config.train.recompute =
        Auto::Is(if solved.form.recompute { config::Recompute::All } else { config::Recompute::Nothing });
    if n_ranks > 1 {
        config.train.shard = Auto::Is(solved.form.shard);
    }
    Ok(())
}

/// Bytes of memory that a checkpoint takes until it is written: what is saved is copied first. On a GPU that is not its own.
pub fn copied_bytes(config: &Config, layout: &Layout) -> i64 {
    let is_copied = !device(config).is_cuda() && config.train.checkpoint_every > 0;
    if is_copied { BYTES_PER_PARAM as i64 * layout.n_params() } else { 0 }
}

/// Tokens of a micro-batch on a CPU: what is good for its caches, or less where memory is short, one sample at least.
fn most_on_cpu(model: &MemoryModel, copied_bytes: i64, max_length: usize) -> Result<usize> {
    let usable = solve::usable(i64::try_from(memory::free_bytes(Device::Cpu)?).unwrap_or(i64::MAX));
    let mut tokens = CPU_MICRO_BATCH_TOKENS.max(max_length);
    while tokens / 2 >= max_length && model.total(tokens as i64) + copied_bytes > usable {
        tokens /= 2;
    }
    Ok(tokens)
}

fn resolve_device(config: &mut Config) -> Result<Option<String>> {
    if config.model.device == Auto::Is(config::Device::Cpu) {
        return Ok(None);
    }
    match device::cuda() {
        Cuda::Usable(gpu) => {
            config.model.device = Auto::Is(config::Device::Cuda);
            let cost =
                "; deterministic: sums in one order, which is slower and takes more memory in attention's backward";
            Ok(Some(format!("{gpu}{}", if config.train.deterministic { cost } else { "" })))
        }
        Cuda::Missing { what, hint } if config.model.device == Auto::Auto => {
            config.model.device = Auto::Is(config::Device::Cpu);
            Ok(device::has_driver().then(|| format!("cpu, not cuda: {what}; {hint}")))
        }
        Cuda::Missing { what, hint } => {
            let what = format!("\"cuda\" is asked for, but {what}");
            Err(Error::invalid("model.device", what).hint(format!("{hint}; or write device = \"auto\" or \"cpu\"")))
        }
    }
}

fn resolve_dtype(config: &mut Config) -> Result<()> {
    let is_cuda = config.model.device == Auto::Is(config::Device::Cuda);
    let (major, minor) = if is_cuda { device::capability() } else { (0, 0) };
    let has_bf16 = (major, minor) >= BF16_CAPABILITY;
    if is_cuda && !has_bf16 && config.model.dtype == Auto::Is(config::Dtype::Bf16) {
        let what =
            format!("\"bf16\" is asked for, and a GPU of compute capability {major}.{minor} has no products in it");
        return Err(Error::invalid("model.dtype", what).hint("write dtype = \"auto\" or \"fp16\""));
    }
    if config.model.dtype == Auto::Auto {
        config.model.dtype = Auto::Is(match (is_cuda, has_bf16) {
            (true, true) => config::Dtype::Bf16,
            (true, false) => config::Dtype::Fp16,
            (false, _) => config::Dtype::Fp32,
        });
    }
    Ok(())
}

/// Settles which answers are learned: every one with a chat template, else the last.
pub(super) fn learn(config: &mut Config, template: &Prompting) {
    if config.data.learn == Auto::Auto {
        let is_chat = matches!(template, Prompting::Chat(_));
        config.data.learn = Auto::Is(if is_chat { Answers::All } else { Answers::Last });
    }
}
