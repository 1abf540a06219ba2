//! `bellora plan`.

use std::fmt::Write as _;

use clap::Args;
use tch::Kind;

use crate::cli::{ConfigArgs, print, signals};
use crate::config::{self, Auto, Config, Dtype, Duration, Recompute};
use crate::data::Lengths;
use crate::error::{Error, Result};
use crate::log::show_progress;
use crate::model::lora::LoraSpec;
use crate::model::params::Layout;
use crate::model::shape::ModelShape;
use crate::model::shapes;
use crate::plan::estimate::{Files, Plan, PlannedMachine, Samples, Task};
use crate::plan::gib;
use crate::plan::gpus::GpuModel;
use crate::run::banner::grouped;
use crate::run::resolve_auto;
use crate::run::setup::{self, CacheUse, Job, ModelSetup};
use crate::torch::memory;

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plan for this GPU: T4, V100-16, V100-32, A10, L4, L40S, 3090, 4090, A100-40, A100-80, H100, H200 [default: this
    /// machine]
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// Share the work among so many
    #[arg(long, value_name = "N", default_value_t = 1, requires = "gpu", allow_negative_numbers = true)]
    n_gpus: i64,
    /// Plan for a model without its files: a known shape's name, or a config.json; samples are then those of --lengths
    #[arg(long, value_name = "NAME|FILE")]
    shape: Option<String>,
    /// Rows of the vocabulary, instead of the shape's
    #[arg(long, value_name = "N", requires = "shape")]
    vocab_size: Option<i64>,
    /// Lengths of samples: a file, or a number for equal ones [default: BELLE's, 175 tokens on average]
    #[arg(long, value_name = "FILE|N", requires = "shape")]
    lengths: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What is planned: the parts of a job that are read from files, or stand in for them.
struct Subject {
    /// As asked for, `auto` where the user left it at that.
    config: Config,
    shape: ModelShape,
    lora: LoraSpec,
    layout: Layout,
    lengths: Vec<(usize, usize)>,
    has_files: bool,
    /// The config as this machine settles it.
    here: Config,
}

pub(super) fn run(args: &PlanArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let gpu = args.gpu.as_deref().map(GpuModel::named).transpose()?;
    let subject = match &args.shape {
        Some(shape) => Subject::without_files(args, shape, gpu)?,
        None => Subject::of_files(args, gpu)?,
    };
    let plan = subject.plan(gpu, args.n_gpus)?;
    if args.json {
        let text = serde_json::to_string_pretty(&plan).map_err(|e| Error::failed("the plan", e.to_string()))?;
        return print(&format!("{text}\n"));
    }
    print(&table(&plan))
}

/// A config that this machine can settle: a plan for another machine does not ask it for a GPU, nor for its dtypes.
fn for_here(config: &Config, gpu: Option<GpuModel>) -> Config {
    let mut here = config.clone();
    if gpu.is_some() {
        here.model.device = Auto::Is(config::Device::Cpu);
    }
    here
}

impl Subject {
    fn without_files(args: &PlanArgs, shape: &str, gpu: Option<GpuModel>) -> Result<Self> {
        let config = Config::load_without_files(Some(&args.config.config), &args.config.sets)?;
        let shape = shapes::open(shape, args.vocab_size, &config.model.allow_config_keys)?;
        let lengths = match &args.lengths {
            Some(text) => Lengths::of_argument(text)?,
            None => Lengths::belle()?,
        };
        let max_length = config.data.max_length;
        let cut = |tokens: u32, learned: u32| {
            let beyond = (tokens as usize).saturating_sub(max_length);
            (tokens as usize - beyond, (learned as usize).saturating_sub(beyond))
        };
        let lengths = lengths.samples().iter().map(|l| cut(l.tokens, l.learned)).collect();
        let lora = setup::lora_spec(&config);
        let layout = Layout::new(&shape, &lora, shape.vocab_size);
        let mut here = for_here(&config, gpu);
        let _ = resolve_auto::device_and_dtype(&mut here)?;
        resolve_auto::micro_batches(&mut here, &shape, &lora, &layout, 1)?;
        Ok(Self { config, shape, lora, layout, lengths, has_files: false, here })
    }

    fn of_files(args: &PlanArgs, gpu: Option<GpuModel>) -> Result<Self> {
        let config = args.config.load_to_read()?;
        let Job { model, train, .. } = Job::inspect(for_here(&config, gpu), CacheUse::Read, 1)?;
        let lengths = (0..train.len()).map(|sample| (train.ids(sample).len(), train.label_tokens(sample))).collect();
        let mut shape = model.base.clone();
        shape.vocab_size = model.vocab_size;
        let ModelSetup { lora, layout, config: here, .. } = model;
        Ok(Self { config, shape, lora, layout, lengths, has_files: true, here })
    }

    fn plan(&self, gpu: Option<GpuModel>, n_gpus: i64) -> Result<Plan> {
        let (kind, machine) = self.machine(gpu, n_gpus)?;
        // A CPU's micro-batches do not follow its memory.
        let asked = if machine.device.is_cuda() { &self.config.train } else { &self.here.train };
        let samples = Samples::of(&self.lengths);
        let task = Task {
            shape: &self.shape,
            lora: &self.lora,
            layout: &self.layout,
            kind,
            max_length: self.config.data.max_length as i64,
            global_batch: asked.global_batch as i64,
            total_samples: match asked.duration() {
                Duration::Epochs(epochs) => samples.n_samples * u64::from(epochs),
                Duration::Steps(steps) => steps * asked.global_batch as u64,
            },
            samples,
            micro_batch_tokens: asked.micro_batch_tokens.settled().map(|tokens| tokens as i64),
            recompute: asked.recompute.settled().map(|which| which == Recompute::All),
            shard: asked.shard.settled(),
            files: Files { run: setup::run_bytes(&self.config, &self.layout, None), caches: self.has_files },
        };
        task.plan(&machine)
    }

    /// The compute dtype and where it is computed.
    fn machine(&self, gpu: Option<GpuModel>, n_gpus: i64) -> Result<(Kind, PlannedMachine)> {
        let Some(gpu) = gpu else {
            let device = resolve_auto::device(&self.here);
            let available = i64::try_from(memory::free_bytes(device)?).unwrap_or(i64::MAX);
            return Ok((resolve_auto::kind(&self.here), PlannedMachine { device, available, gpu: None, n_gpus: 1 }));
        };
        let kind = match self.config.model.dtype {
            Auto::Is(Dtype::Bf16) if !gpu.has_bf16 => {
                let what = format!("\"bf16\" is asked for, and a {} has no products in it", gpu.name);
                return Err(Error::invalid("model.dtype", what).hint("write dtype = \"auto\" or \"fp16\""));
            }
            Auto::Is(Dtype::Fp32) => Kind::Float,
            Auto::Is(Dtype::Fp16) => Kind::Half,
            Auto::Is(Dtype::Bf16) => Kind::BFloat16,
            Auto::Auto if gpu.has_bf16 => Kind::BFloat16,
            Auto::Auto => Kind::Half,
        };
        Ok((kind, PlannedMachine::of_gpu(gpu, n_gpus)?))
    }
}

/// The plan as people read it.
fn table(plan: &Plan) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: String| {
        let _ = writeln!(text, "{name:<12}{what}");
    };
    let in_tables = match plan.table_params {
        0 => String::new(),
        tables => format!(", {} of them in tables", grouped(tables)),
    };
    line(
        "trainable",
        format!("{} of {} parameters{in_tables}, {}", grouped(plan.trainable_params), grouped(plan.params), plan.dtype),
    );
    let samples = &plan.samples;
    line(
        "data",
        format!(
            "{} samples of {:.0} tokens on average, {:.0} % learned, the longest {}",
            grouped(samples.n_samples as i64),
            samples.mean_tokens(),
            100.0 * samples.learned_share,
            grouped(samples.longest)
        ),
    );
    line(
        "device",
        format!(
            "{} x {}{}: {} free for the program, {} may be used (the rest is a margin for fragmentation)",
            plan.n_gpus,
            plan.device,
            if plan.shard { ", the optimizer's state sharded" } else { "" },
            gib(plan.available_bytes),
            gib(plan.usable_bytes)
        ),
    );
    line(
        "micro-batch",
        format!(
            "{} tokens{}, recompute {}; at most {} without recompute, {} with",
            grouped(plan.micro_batch_tokens),
            if plan.micro_batch_given { " (given)" } else { "" },
            if plan.recompute { "on" } else { "off" },
            grouped(plan.largest.keeping),
            grouped(plan.largest.recomputing)
        ),
    );
    line(
        "memory",
        format!("{} at the peak of a step{}", gib(plan.memory_bytes), if plan.fits { "" } else { ": TOO MUCH" }),
    );
    for part in plan.memory.iter().filter(|part| part.bytes > 0) {
        line("", format!("{:<18}{:>10}", part.part.name(), gib(part.bytes)));
    }
    let flops = &plan.flops_a_token;
    line("work", format!("{:.2} GFLOP a token", (flops.total() + flops.recompute) / 1e9));
    for (name, value) in [
        ("base forward", flops.base_forward),
        ("base backward", flops.base_backward),
        ("adapters", flops.lora),
        ("head", flops.head),
        ("attention", flops.attention),
        ("recompute", flops.recompute),
    ] {
        if value > 0.0 {
            line("", format!("{name:<18}{:>10.2}", value / 1e9));
        }
    }
    match &plan.speed {
        Some(speed) => line(
            "time",
            format!(
                "about {} tokens/s: {} for the {} tokens of the job, {} for a million such samples (an estimate, \
                 not measured: {:.0} % of the data sheet's {} TFLOP/s are assumed)",
                grouped(speed.tokens_per_s as i64),
                duration(speed.hours),
                grouped(speed.total_tokens as i64),
                duration(speed.hours_a_million_samples),
                100.0 * speed.assumed_utilisation,
                speed.peak_tflops
            ),
        ),
        None => line("time", "not estimated here: `bellora bench` measures it".to_string()),
    }
    let disk = &plan.disk;
    line(
        "disk",
        format!(
            "{}: {} checkpoints of {}, adapter {}, token cache {}",
            gib(disk.total_bytes),
            disk.checkpoints,
            gib(disk.checkpoint_bytes),
            gib(disk.adapter_bytes),
            gib(disk.cache_bytes)
        ),
    );
    text
}

/// Hours as people say them.
fn duration(hours: f64) -> String {
    match hours {
        h if h >= 1.0 => format!("{h:.1} hours"),
        h if h >= 1.0 / 60.0 => format!("{:.0} minutes", h * 60.0),
        h => format!("{:.0} seconds", h * 3600.0),
    }
}
