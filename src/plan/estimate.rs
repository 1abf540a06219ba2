//! What a training job takes on a machine: memory, micro-batches, work, time, disk.

use serde::Serialize;
use tch::{Device, Kind};

use crate::checkpoint::save::RunBytes;
use crate::error::{Error, Result};
use crate::model::flops::{Flops, TokenMix};
use crate::model::lora::LoraSpec;
use crate::model::params::Layout;
use crate::model::shape::ModelShape;
use crate::plan::gpus::GpuModel;
use crate::plan::memory::{MemoryModel, frozen_params};
use crate::plan::parts::{PartBytes, sum};
use crate::plan::solve::{Bounds, Form, Solved, Wanted, largest_that_fits, settle, usable};
use crate::torch::dtype;

/// The share of a GPU's data-sheet peak that training is assumed to reach: what public LoRA trainers show for a 7B model on
/// an H100. It is an assumption, not a measurement of this program.
pub const ASSUMED_UTILISATION: f64 = 0.4;

/// Bytes of a token in the token cache, and of a sample beside its tokens.
const CACHE_BYTES: (i64, i64) = (4, 16);

/// A job as far as planning needs to know it.
#[derive(Debug, Clone)]
pub struct Task<'a> {
    /// The base's shape; its vocabulary with grown rows.
    pub shape: &'a ModelShape,
    /// The adapters.
    pub lora: &'a LoraSpec,
    /// The trained parameters.
    pub layout: &'a Layout,
    /// The compute dtype.
    pub kind: Kind,
    /// What the samples are like.
    pub samples: Samples,
    /// `data.max_length`.
    pub max_length: i64,
    /// Samples an update, over all GPUs.
    pub global_batch: i64,
    /// Samples that are learned in all, over all epochs.
    pub total_samples: u64,
    /// Tokens a micro-batch, where the config says.
    pub micro_batch_tokens: Option<i64>,
    /// Whether activations are computed again, where the config says.
    pub recompute: Option<bool>,
    /// Whether the optimizer's state is sharded over the GPUs, where the config says.
    pub shard: Option<bool>,
    /// What is written.
    pub files: Files,
}

/// The samples of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Samples {
    /// How many there are.
    pub n_samples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// The tokens of the longest.
    pub longest: i64,
    /// The share of tokens that are learned.
    pub learned_share: f64,
    /// Positions that a token attends to on average.
    pub attended: f64,
}

/// What a job writes.
#[derive(Debug, Clone, Copy)]
pub struct Files {
    /// Below the run's folder.
    pub run: RunBytes,
    /// Whether tokens are cached.
    pub caches: bool,
}

/// Where the job is to run.
#[derive(Debug, Clone, Copy)]
pub struct PlannedMachine {
    /// The kind of memory.
    pub device: Device,
    /// Bytes that the program may hold on each device.
    pub available: i64,
    /// The data sheet, where one is known.
    pub gpu: Option<GpuModel>,
    /// How many of them share the work.
    pub n_gpus: i64,
}

/// A plan, ready to be shown.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// `cpu`, `cuda`, or the GPU's name.
    pub device: String,
    /// How many.
    pub n_gpus: i64,
    /// Bytes that the program finds free.
    pub available_bytes: i64,
    /// Of those, what it may use; the rest is left for fragmentation.
    pub usable_bytes: i64,
    /// The compute dtype.
    pub dtype: &'static str,
    /// Trained parameters.
    pub trainable_params: i64,
    /// Of those, in tables of the vocabulary.
    pub table_params: i64,
    /// All parameters.
    pub params: i64,
    /// The samples.
    pub samples: Samples,
    /// What is held whatever the micro-batches are.
    pub static_bytes: i64,
    /// Tokens of a micro-batch: the config's, or the most that fit.
    pub micro_batch_tokens: i64,
    /// Whether they were the config's own choice.
    pub micro_batch_given: bool,
    /// Whether activations are computed again in backward.
    pub recompute: bool,
    /// Whether each GPU holds a part of the optimizer's state only.
    pub shard: bool,
    /// The largest micro-batches that fit, whatever an update needs.
    pub largest: Largest,
    /// The peak of a step, by part.
    pub memory: Vec<PartBytes>,
    /// Their sum.
    pub memory_bytes: i64,
    /// Whether that fits.
    pub fits: bool,
    /// Operations a token.
    pub flops_a_token: Flops,
    /// Time, if it can be estimated: on a known GPU in half precision.
    pub speed: Option<Speed>,
    /// Disk.
    pub disk: Disk,
}

/// The largest micro-batches that fit, in tokens; 0 where none does.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Largest {
    /// With activations kept.
    pub keeping: i64,
    /// With activations computed again.
    pub recomputing: i64,
}

/// What time a job takes, as an estimate.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Speed {
    /// Always true: nothing here was measured.
    pub is_estimate: bool,
    /// The data sheet's peak of one GPU.
    pub peak_tflops: f64,
    /// The share of it that is assumed.
    pub assumed_utilisation: f64,
    /// Tokens a second on all GPUs, as if they did not wait for each other.
    pub tokens_per_s: f64,
    /// Tokens of the whole job.
    pub total_tokens: u64,
    /// The whole job.
    pub hours: f64,
    /// A million samples of this kind.
    pub hours_a_million_samples: f64,
}

/// What a job writes, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Disk {
    /// One checkpoint.
    pub checkpoint_bytes: i64,
    /// The most checkpoints that exist at a time: those kept and the one being written.
    pub checkpoints: i64,
    /// The final adapter.
    pub adapter_bytes: i64,
    /// The token cache.
    pub cache_bytes: i64,
    /// All together.
    pub total_bytes: i64,
}

impl Samples {
    /// Takes down samples given by their tokens and how many of them are learned.
    pub fn of(lengths: &[(usize, usize)]) -> Self {
        let mix = TokenMix::of(lengths.iter().copied());
        Self {
            n_samples: lengths.len() as u64,
            tokens: lengths.iter().map(|(tokens, _)| *tokens as u64).sum(),
            longest: lengths.iter().map(|(tokens, _)| *tokens as i64).max().unwrap_or_default(),
            learned_share: mix.learned_share,
            attended: mix.attended,
        }
    }

    /// Tokens of a sample on average.
    pub fn mean_tokens(&self) -> f64 {
        self.tokens as f64 / self.n_samples.max(1) as f64
    }

    fn mix(&self) -> TokenMix {
        TokenMix { learned_share: self.learned_share, attended: self.attended }
    }
}

impl Task<'_> {
    /// The memory of the job on each device of a machine.
    pub fn memory(&self, machine: &PlannedMachine, form: Form) -> MemoryModel {
        let model = MemoryModel::new(self.shape, self.lora, self.layout, self.kind, machine.device, form.recompute);
        if form.shard { model.sharded(machine.n_gpus as usize) } else { model }
    }

    /// Plans the job for a machine.
    ///
    /// # Errors
    /// A longest sample that does not fit, where the config leaves the micro-batch to the plan.
    pub fn plan(&self, machine: &PlannedMachine) -> Result<Plan> {
        let Solved { tokens, form } = self.micro_batch(machine)?;
        let Form { recompute, shard } = form;
        let largest =
            |recompute| largest_that_fits(&self.memory(machine, Form { recompute, shard }), machine.available);
        let memory = self.memory(machine, form);
        let parts = memory.by_part(tokens);
        let flops = Flops::a_token(self.shape, self.lora, self.samples.mix(), recompute);
        let device = match (machine.gpu, machine.device) {
            (Some(gpu), _) => gpu.name,
            (None, Device::Cpu) => "cpu",
            (None, _) => "cuda",
        };
        Ok(Plan {
            device: device.to_string(),
            n_gpus: machine.n_gpus,
            available_bytes: machine.available,
            usable_bytes: usable(machine.available),
            dtype: dtype::name(self.kind),
            trainable_params: self.layout.n_params(),
            table_params: self.layout.n_table_params(),
            params: self.layout.n_params() + frozen_params(self.shape, self.lora),
            samples: self.samples.clone(),
            static_bytes: memory.lasting(),
            micro_batch_tokens: tokens,
            micro_batch_given: self.micro_batch_tokens.is_some(),
            recompute,
            shard,
            largest: Largest { keeping: largest(false), recomputing: largest(true) },
            memory_bytes: sum(&parts),
            fits: sum(&parts) <= usable(machine.available),
            memory: parts,
            flops_a_token: flops,
            speed: machine.gpu.filter(|_| self.kind != Kind::Float).map(|gpu| self.speed(gpu, machine.n_gpus, &flops)),
            disk: self.disk(),
        })
    }

    /// Tokens of a micro-batch and what they cost.
    fn micro_batch(&self, machine: &PlannedMachine) -> Result<Solved> {
        let share = (self.global_batch + machine.n_gpus - 1) / machine.n_gpus.max(1);
        let bounds = Bounds { max_length: self.max_length, samples: share };
        let wanted = Wanted { tokens: self.micro_batch_tokens, recompute: self.recompute, shard: self.shard };
        settle(|form| self.memory(machine, form), wanted, machine.n_gpus as usize, machine.available, bounds)
    }

    fn speed(&self, gpu: GpuModel, n_gpus: i64, flops: &Flops) -> Speed {
        let a_token = flops.total() + flops.recompute;
        let tokens_per_s = n_gpus as f64 * gpu.peak_tflops * 1e12 * ASSUMED_UTILISATION / a_token;
        let total_tokens = self.total_samples as f64 * self.samples.mean_tokens();
        Speed {
            is_estimate: true,
            peak_tflops: gpu.peak_tflops,
            assumed_utilisation: ASSUMED_UTILISATION,
            tokens_per_s,
            total_tokens: total_tokens as u64,
            hours: total_tokens / tokens_per_s / 3600.0,
            hours_a_million_samples: 1e6 * self.samples.mean_tokens() / tokens_per_s / 3600.0,
        }
    }

    fn disk(&self) -> Disk {
        let Files { run, caches } = self.files;
        let (a_token, a_sample) = CACHE_BYTES;
        let cached = a_token * self.samples.tokens as i64 + a_sample * self.samples.n_samples as i64;
        let cache_bytes = if caches { cached } else { 0 };
        Disk {
            checkpoint_bytes: run.checkpoint as i64,
            checkpoints: run.checkpoints as i64,
            adapter_bytes: run.adapter as i64,
            cache_bytes,
            total_bytes: run.total() as i64 + cache_bytes,
        }
    }
}

/// GPUs that one job may have.
const MOST_GPUS: i64 = 1 << 20;

impl PlannedMachine {
    /// A GPU of the list, or several.
    ///
    /// # Errors
    /// No GPU at all.
    pub fn of_gpu(gpu: GpuModel, n_gpus: i64) -> Result<Self> {
        if !(1..=MOST_GPUS).contains(&n_gpus) {
            let what = format!("expected at least 1 and at most {MOST_GPUS}, found {n_gpus}");
            return Err(Error::invalid("--n-gpus", what).hint("leave it out for one"));
        }
        Ok(Self { device: Device::Cuda(0), available: gpu.available_bytes(), gpu: Some(gpu), n_gpus })
    }
}
