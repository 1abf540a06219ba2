//! How fast this machine trains a model: updates of the engine itself, over samples of given lengths.
//!
//! The updates that count run as they do in training, timed from one known outcome to the next. The parts of a step are
//! timed afterwards in updates of their own, because to wait for the device between them slows it down.

mod ceiling;
mod clock;
pub mod dtypes;
pub mod pieces;
pub mod report;
mod trace;

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use tch::{Device, Kind};

use crate::config::{Auto, Config, Recompute};
use crate::data::{Dataset, EpochOrder, Lengths, TokenCache, build_batches};
use crate::engine::optim::adamw::{AdamW, AdamWConfig};
use crate::engine::optim::loss_scale::LossScale;
use crate::engine::optim::schedule::{LrSchedule, Shape};
use crate::engine::state::TrainState;
use crate::engine::step::{StepSettings, Trainer};
use crate::error::{Error, Result};
use crate::model::decoder::{Compute, Decoder};
use crate::model::flops::TokenMix;
use crate::model::init::{NewRows, initialise};
use crate::model::lora::LoraSpec;
use crate::model::params::{Layout, ParamBuffer};
use crate::model::shape::ModelShape;
use crate::model::weights::BaseWeights;
use crate::plan::{MemoryModel, expect_to_fit};
use crate::run::resolve_auto;
use crate::run::setup::{self, ModelSetup};
use crate::torch::cuda::set_numerics;
use crate::torch::memory;
use report::{AllocatorReport, BenchReport, Measured, MemoryReport};

/// Samples that are drawn, at most; more updates than they last for begin with them again.
const MOST_SAMPLES: usize = 1 << 20;
/// For how long products are timed.
const CEILING_TIME: Duration = Duration::from_millis(400);
/// Updates whose parts are timed, at most.
const UPDATES_BY_PART: u64 = 3;

/// What to measure.
pub struct Bench {
    /// Adapters, dtype, batch and the like; base and data as well, where no others are given.
    pub config: Config,
    /// A shape by its name, to be filled with random weights.
    pub shape: Option<(String, ModelShape)>,
    /// The lengths of samples of random ids.
    pub lengths: Option<Lengths>,
    /// Updates that are timed.
    pub updates: u64,
    /// Updates before them.
    pub warmup: u64,
    /// Where the kernels of two further updates are written with their times.
    pub trace: Option<PathBuf>,
}

/// What is trained, in words and numbers.
pub struct Subject {
    /// A shape's name, or the folder of a base.
    pub name: String,
    /// Whether the weights were drawn.
    pub is_random: bool,
    /// The base's shape, with as many rows in its tables as are trained.
    pub shape: ModelShape,
    /// The adapters.
    pub lora: LoraSpec,
    /// Where the trained parameters lie.
    pub layout: Layout,
    /// What the samples are.
    pub samples: String,
    /// The config, nothing in it left to the machine.
    pub config: Config,
    /// The dtype of weights, activations and products.
    pub kind: Kind,
    /// Where it is trained.
    pub device: Device,
}

impl Bench {
    /// Measures; `tell` hears what is being done.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what the config and the files that it names have wrong; else whatever ends a training.
    pub fn run(mut self, tell: &dyn Fn(&str)) -> Result<BenchReport> {
        if let Some(file) = &self.trace {
            trace::check_file(file)?;
        }
        if let Some(note) = self.settle()? {
            tell(&note);
        }
        let (subject, setup, samples) = self.subject()?;
        let Subject { kind, device, .. } = subject;
        set_numerics(subject.config.train.deterministic)?;
        tell("measuring the fastest product");
        let ceiling = ceiling::measure(kind, device, CEILING_TIME)?;
        memory::release_cached(device)?;

        tell("making the model");
        let before_bytes = memory::in_use_bytes(device)?;
        memory::reset_peak(device)?;
        let allocator_before = memory::allocator_counts(device)?;
        let (params, model) = match &setup {
            Some(setup) => {
                let params = setup.initial_params()?;
                let model = setup.load(&params)?;
                (params, model)
            }
            None => subject.drawn()?,
        };
        let (warmup, updates) = (self.warmup, self.updates);
        let mut trainer = trainer(&subject, params, model, samples, warmup + updates)?;
        let recompute = trainer.settings.recompute;
        let model = MemoryModel::new(&subject.shape, &subject.lora, &subject.layout, kind, device, recompute);
        if device.is_cuda() {
            // As a run does before its first step.
            trainer.try_largest(&|tokens| model.expected(tokens), subject.config.data.max_length)?;
        }
        let is_warming_up = |done| tell(&format!("update {done} of {warmup} before those that count"));
        clock::time_updates(&mut trainer, warmup, device, &is_warming_up)?;
        let is_timed = |done| tell(&format!("update {done} of {updates}"));
        let timed = clock::time_updates(&mut trainer, updates, device, &is_timed)?;
        if let Some(note) = trainer.take_note() {
            tell(&note);
        }
        let peak_bytes = memory::peak_bytes(device)?;
        let allocator = AllocatorReport::between(allocator_before, memory::allocator_counts(device)?);
        tell("timing the parts of a step");
        let parts = clock::time_parts(&mut trainer, updates.min(UPDATES_BY_PART), device)?;
        let trace = match &self.trace {
            Some(file) => {
                tell("tracing two updates");
                Some(trace::record(&mut trainer, device, file)?)
            }
            None => None,
        };

        let (mix, _) = batches_of(&trainer, warmup..warmup + updates);
        let (_, (smallest, largest)) = batches_of(&trainer, 0..warmup + updates);
        let model = if smallest == largest { model.of_equal_micro_batches() } else { model };
        let predicted = model.by_part(largest as i64);
        let predicted_bytes = predicted.iter().map(|part| part.bytes).sum();
        let memory = MemoryReport {
            before_bytes,
            peak_bytes,
            predicted_bytes,
            largest_micro_batch: largest,
            predicted,
            allocator,
        };
        Ok(BenchReport::new(
            &subject,
            &trainer.settings,
            Measured { ceiling, warmup, timed, parts, mix, memory, trace },
        ))
    }

    /// Fits the config to the lengths and settles where and in what dtype is computed; gives what is worth a word about the
    /// device.
    fn settle(&mut self) -> Result<Option<String>> {
        if self.shape.is_some() && self.lengths.is_none() {
            self.lengths = Some(Lengths::belle()?);
        }
        if let Some(lengths) = &self.lengths {
            let longest = lengths.longest();
            self.config.data.max_length = longest;
            // They are in a drawn order already: updates take them as they were drawn.
            self.config.data.shuffle = false;
            if let Auto::Is(tokens) = self.config.train.micro_batch_tokens
                && tokens < longest
            {
                let what = format!("{tokens} do not hold the longest sample, which has {longest}");
                return Err(Error::invalid("train.micro_batch_tokens", what)
                    .hint(format!("give --micro-batch-tokens {longest} or more, or shorter --lengths")));
            }
        }
        resolve_auto::device_and_dtype(&mut self.config)
    }

    /// Finds out everything that can be known before the model is made. A base of files comes with its set-up.
    fn subject(&self) -> Result<(Subject, Option<ModelSetup>, Dataset)> {
        let mut config = self.config.clone();
        let (name, shape, lora, layout, setup) = match &self.shape {
            Some((name, shape)) => {
                let lora = setup::lora_spec(&config);
                let layout = Layout::new(shape, &lora, shape.vocab_size);
                resolve_auto::micro_batches(&mut config, shape, &lora, &layout, 1)?;
                (name.clone(), shape.clone(), lora, layout, None)
            }
            None => {
                let setup = ModelSetup::inspect(config, 1)?;
                config = setup.config.clone();
                let shape = ModelShape { vocab_size: setup.vocab_size, ..setup.base.clone() };
                let name = config.model.base.display().to_string();
                (name, shape, setup.lora.clone(), setup.layout.clone(), Some(setup))
            }
        };
        refuse_what_does_not_fit(&config, &shape, &lora, &layout)?;
        let data = &config.data;
        let (samples, about) = match (&self.lengths, &setup) {
            (None, Some(setup)) => {
                let names: Vec<String> = data.train.iter().map(|path| path.display().to_string()).collect();
                (setup.dataset(&data.train, TokenCache::Read(&data.cache_dir))?, names.join(", "))
            }
            (None, None) => return Err(Error::failed("bellora bench", "has neither lengths nor data")),
            (Some(lengths), _) => {
                let n_updates = self.warmup + self.updates + UPDATES_BY_PART;
                let n_samples = (n_updates as usize).saturating_mul(config.train.global_batch).min(MOST_SAMPLES);
                let seed = config.train.seed;
                let vocab_size = u32::try_from(shape.vocab_size).unwrap_or(u32::MAX);
                (Dataset::random(&lengths.draw(n_samples, seed), vocab_size, seed), lengths.about.clone())
            }
        };
        let (kind, device, is_random) = (resolve_auto::kind(&config), resolve_auto::device(&config), setup.is_none());
        let subject = Subject { name, is_random, shape, lora, layout, samples: about, config, kind, device };
        Ok((subject, setup, samples))
    }
}

impl Subject {
    /// The parameters and the model, drawn where they stay.
    fn drawn(&self) -> Result<(ParamBuffer, Decoder)> {
        let Self { shape, lora, layout, config, kind, device, .. } = self;
        let (seed, kind, device) = (config.train.seed, *kind, *device);
        let base = BaseWeights::Random { seed };
        let mut params = ParamBuffer::new(layout.clone(), kind, device)?;
        initialise(&mut params, shape, lora, base, NewRows::Normal, seed)?;
        let compute = Compute { kind, device, max_positions: config.data.max_length as i64 };
        let model = Decoder::load(shape, base, lora, &params, compute)?;
        Ok((params, model))
    }
}

/// Refuses a model that this machine's memory does not hold; on a GPU the size of micro-batches was settled by that.
fn refuse_what_does_not_fit(config: &Config, shape: &ModelShape, lora: &LoraSpec, layout: &Layout) -> Result<()> {
    let (device, recompute) = (resolve_auto::device(config), config.train.recompute == Auto::Is(Recompute::All));
    let model = MemoryModel::new(shape, lora, layout, resolve_auto::kind(config), device, recompute);
    let hint = "measure a smaller shape, or the same in model.dtype = \"bf16\", or on a machine with more memory";
    expect_to_fit("bellora bench", model.total(config.data.max_length as i64), &memory::room(device)?, hint)
}

/// A trainer before its first step, with a learning rate that stays the same.
fn trainer(subject: &Subject, params: ParamBuffer, model: Decoder, samples: Dataset, total: u64) -> Result<Trainer> {
    let train = &subject.config.train;
    let schedule = LrSchedule { learning_rate: train.learning_rate, shape: Shape::Constant, warmup: 0, total };
    let settings = setup::step_settings(&subject.config, schedule);
    let optimizer =
        AdamW::new(AdamWConfig { betas: train.betas, eps: train.eps, weight_decay: train.weight_decay }, &params)?;
    Trainer::new(settings, samples, model, params, optimizer, TrainState::start(LossScale::of(subject.kind)))
}

/// What the tokens of some steps were like, and how many the smallest and the largest micro-batch held.
fn batches_of(trainer: &Trainer, steps: Range<u64>) -> (TokenMix, (usize, usize)) {
    let StepSettings { global_batch, shuffle, seed, loss_average, micro_batch_tokens, .. } = trainer.settings;
    let mut order = EpochOrder::new(trainer.samples.len(), global_batch, shuffle, seed);
    let taken: Vec<Vec<u32>> = steps.map(|step| order.step_samples(step)).collect();
    let length =
        |sample: &u32| (trainer.samples.ids(*sample as usize).len(), trainer.samples.label_tokens(*sample as usize));
    let mix = TokenMix::of(taken.iter().flatten().map(length));
    let batches = taken.iter().flat_map(|s| build_batches(&trainer.samples, s, loss_average, micro_batch_tokens));
    let sizes = batches.map(|batch| batch.input_ids.len());
    (mix, sizes.fold((usize::MAX, 0), |(least, most), size| (least.min(size), most.max(size))))
}
