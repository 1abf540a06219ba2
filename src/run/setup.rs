//! Everything that can be known before training: the model's shape, the tokenizer, the samples, the number of updates.
//!
//! `check` stops here; `train` and `eval` go on from here. All faults are collected and reported at once.

use tch::{Device, Kind};

use crate::checkpoint::adapter_file::{self, AdapterConfig};
use crate::checkpoint::save::RunBytes;
use crate::config::{self, Auto, CacheDir, Config, Duration, TemplateChoice, Warmup};
use crate::data::{
    Answers, DataSpec, Dataset, LossAverage, Prompting, Template, TemplateFile, TokenCache, Tokenizer, template_check,
};
use crate::engine::optim::schedule::{LrSchedule, warmup_updates};
use crate::engine::step::StepSettings;
use crate::error::{Error, Fault, Result};
use crate::formats::model_keys::CONFIG;
use crate::formats::safetensors_in::TensorFiles;
use crate::model::arch;
use crate::model::decoder::{Compute, Decoder};
use crate::model::init::initialise;
use crate::model::lora::LoraSpec;
use crate::model::params::{Layout, ParamBuffer};
use crate::model::shape::{ModelShape, Projection, Table};
use crate::model::weights::{BaseWeights, check_base};
use crate::plan::MemoryModel;
use crate::run::disagreements::{attention_dropout, other_ends, special_tokens_as_text};
use crate::run::parts::{open_init_adapter, open_tokenizer, vocab_size};
use crate::run::resolve_auto;
use crate::torch::cuda::set_numerics;

/// The model of a config, checked but not loaded, with its tokenizer and template.
pub struct ModelSetup {
    /// The resolved config, no `auto` left but for what one rank alone leaves open.
    pub config: Config,
    /// How many ranks share the work.
    pub n_ranks: usize,
    /// The base's shape.
    pub base: ModelShape,
    /// The base's files.
    pub files: TensorFiles,
    /// The adapters.
    pub lora: LoraSpec,
    /// Rows of the tables, grown ones included.
    pub vocab_size: i64,
    /// Where the trainable parameters lie.
    pub layout: Layout,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The text around instruction and answer.
    pub template: Prompting,
    /// What the files of the model hold that may not be what the user means, though it is no fault.
    pub warnings: Vec<Fault>,
    /// What is worth a word about the device: the GPU that is used, or why one is not.
    pub device_note: Option<String>,
    /// The adapter to start from.
    init: Option<TensorFiles>,
}

/// A whole training job, checked.
pub struct Job {
    /// The model.
    pub model: ModelSetup,
    /// The samples to learn.
    pub train: Dataset,
    /// The samples to evaluate on, if any.
    pub validation: Option<Dataset>,
    /// Steps of the run.
    pub total_steps: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// The learning rate.
    pub schedule: LrSchedule,
}

/// What a command does with the token cache of its config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheUse {
    /// It makes all tokens anew.
    Off,
    /// It reads what is there.
    Read,
    /// The same, and it says what would keep training from writing there.
    Judge,
    /// It keeps tokens there.
    Keep,
}

/// Collects faults from steps that do not depend on each other.
#[derive(Default)]
struct Gather(Vec<Fault>);

impl Gather {
    fn take<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Invalid(faults)) => {
                self.0.extend(faults);
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    fn finish(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self.0)) }
    }
}

impl ModelSetup {
    /// Checks the model, tokenizer and template of a config and settles its `auto` values for so many ranks. Reads headers, not
    /// weights.
    pub fn inspect(mut config: Config, n_ranks: usize) -> Result<Self> {
        let mut faults = Gather::default();
        let mut warnings = config.warnings.clone();
        let device_note = faults.take(resolve_auto::device_and_dtype(&mut config))?.flatten();
        let lora = lora_spec(&config);
        let read = faults.take(arch::load(&config.model.base, &config.model.allow_config_keys))?;
        let base = read.map(|read| {
            warnings.extend(read.warnings);
            faults.0.extend(attention_dropout(&read.config, &config.model.base));
            let place = config.model.base.join(CONFIG.file).display().to_string();
            faults.0.extend(read.config.refuse_longer_than_window(config.data.max_length as i64, &place));
            read.config
        });
        let files = match &base {
            Some(_) => faults.take(TensorFiles::open_model(&config.model.base))?,
            None => None,
        };
        if let (Some(base), Some(files)) = (&base, &files) {
            faults.0.extend(check_base(files, base));
        }
        let tokenizer = faults.take(open_tokenizer(&config.model.tokenizer))?;
        warnings.extend(tokenizer.iter().flat_map(Tokenizer::warnings).cloned());
        let template = match &tokenizer {
            Some(tokenizer) => faults.take(template(&config, tokenizer))?,
            None => None,
        };
        if let (TemplateChoice::File(path), Some(Prompting::Strings(template)), Some(tokenizer)) =
            (&config.data.template, &template, &tokenizer)
        {
            warnings.extend(template_check::warnings(template, path, tokenizer));
        }
        if let Some(template) = &template {
            resolve_auto::learn(&mut config, template);
            faults.0.extend(special_tokens_as_text(&config, template));
        }
        let vocab_size = match (&base, &tokenizer) {
            (Some(base), Some(tokenizer)) => faults.take(vocab_size(&config, base, tokenizer, &lora))?,
            _ => None,
        };
        let layout = base.as_ref().zip(vocab_size).map(|(base, vocab)| Layout::for_ranks(base, &lora, vocab, n_ranks));
        if let (Some(base), Some(tokenizer)) = (&base, &tokenizer) {
            warnings.extend(other_ends(&config.model.base, base, tokenizer));
        }
        // Without a device there is no memory to ask for.
        if let (Some(base), Some(layout), true) = (&base, &layout, faults.0.is_empty()) {
            faults.take(resolve_auto::micro_batches(&mut config, base, &lora, layout, n_ranks))?;
        }
        let mut init = None;
        if let (Some(dir), Some(layout)) = (&config.model.init_adapter, &layout) {
            init = faults.take(open_init_adapter(dir, &lora, layout))?;
        }
        faults.finish()?;
        match (base, files, tokenizer, template, vocab_size, layout) {
            (Some(base), Some(files), Some(tokenizer), Some(template), Some(vocab_size), Some(layout)) => Ok(Self {
                config,
                n_ranks,
                base,
                files,
                lora,
                vocab_size,
                layout,
                tokenizer,
                template,
                warnings,
                device_note,
                init,
            }),
            _ => Err(Error::failed("setup", "a part is missing though no fault was found")),
        }
    }

    /// The dtype of weights, activations and products.
    pub fn kind(&self) -> Kind {
        resolve_auto::kind(&self.config)
    }

    /// Where the model computes.
    pub fn device(&self) -> Device {
        resolve_auto::device(&self.config)
    }

    /// Tokens a micro-batch may hold.
    pub fn micro_batch_tokens(&self) -> usize {
        micro_batch_tokens(&self.config)
    }

    /// Allocates the parameters and sets them to their start: drawn, copied from the base, or the initial adapter's.
    pub fn initial_params(&self) -> Result<ParamBuffer> {
        let mut params = ParamBuffer::new(self.layout.clone(), self.kind(), self.device())?;
        let (base, new_rows) = (BaseWeights::Files(&self.files), self.config.model.new_rows);
        initialise(&mut params, &self.base, &self.lora, base, new_rows, self.config.train.seed)?;
        if let Some(init) = &self.init {
            adapter_file::load_into(init, &mut params)?;
        }
        Ok(params)
    }

    /// Loads the base and puts the adapters on it; products are computed from now on as the config has it.
    pub fn load(&self, params: &ParamBuffer) -> Result<Decoder> {
        set_numerics(self.config.train.deterministic)?;
        let max_positions = self.config.data.max_length as i64;
        let compute = Compute { kind: self.kind(), device: self.device(), max_positions };
        Decoder::load(&self.base, BaseWeights::Files(&self.files), &self.lora, params, compute)
    }

    /// Loads and encodes data files, or finds their samples in the token cache.
    pub fn dataset(&self, files: &[std::path::PathBuf], cache: TokenCache<'_>) -> Result<Dataset> {
        let data = &self.config.data;
        let spec = DataSpec {
            files: files.to_vec(),
            max_length: data.max_length,
            truncation: data.truncation,
            special_tokens: data.special_tokens,
            answers: self.answers(),
            max_bad_rows: usize::try_from(data.max_bad_rows).unwrap_or(usize::MAX),
        };
        Dataset::load(&spec, &self.tokenizer, &self.template, cache).map_err(|error| match &error {
            // Where many rows are bad, one hint is enough.
            Error::Invalid(faults) if faults.iter().all(|fault| fault.hint.is_empty()) => error.hint_where_none(
                "a data file has rows such as {\"instruction\": \"...\", \"input\": \"\", \"output\": \"...\"}, one a line or \
                 in one array",
            ),
            _ => error,
        })
    }

    /// Which answers are learned.
    pub fn answers(&self) -> Answers {
        self.config.data.learn.settled().unwrap_or(Answers::Last)
    }

    /// Loads and encodes the validation files, which are never cached.
    pub fn validation_files(&self) -> Result<Dataset> {
        let samples = self.dataset(&self.config.data.validation, TokenCache::Off)?;
        self.has_label_tokens(&samples)?;
        Ok(samples)
    }

    /// Refuses samples that are all cut within their prompts: there is nothing to learn from or to evaluate on.
    fn has_label_tokens(&self, samples: &Dataset) -> Result<()> {
        if samples.n_label_tokens() > 0 {
            return Ok(());
        }
        let (max_length, first) = (self.config.data.max_length, samples.place(0));
        let what =
            format!("{max_length} leaves no label token: every sample is cut within its prompt, from {first} on");
        Err(Error::invalid("data.max_length", what).hint("raise it, or set data.truncation = \"drop\""))
    }

    /// The adapter's configuration as it is written.
    pub fn adapter_config(&self) -> AdapterConfig {
        AdapterConfig { lora: self.lora.clone(), base: Some(self.config.model.base.display().to_string()) }
    }

    /// The small files that travel with the adapter: the tokenizer's and `template.json`.
    pub fn files_beside(&self) -> Vec<(String, Vec<u8>)> {
        let template = TemplateFile::new(&self.template, &self.tokenizer, self.config.data.special_tokens);
        let mut files: Vec<(String, Vec<u8>)> =
            self.tokenizer.files().iter().map(|f| (f.name.clone(), f.bytes.clone())).collect();
        files.push((TemplateFile::NAME.to_string(), template.to_json().into_bytes()));
        files
    }

    /// The memory of this model's training.
    pub fn memory_model(&self) -> MemoryModel {
        let recompute = self.config.train.recompute == Auto::Is(config::Recompute::All);
        let model = MemoryModel::new(&self.base, &self.lora, &self.layout, self.kind(), self.device(), recompute);
        if self.shards() { model.sharded(self.n_ranks) } else { model }
    }

    /// Whether each rank holds the optimizer's state of a part of the parameters only.
    pub fn shards(&self) -> bool {
        self.n_ranks > 1 && self.config.train.shard == Auto::Is(true)
    }

    /// How the losses of an update are averaged.
    pub fn loss_average(&self) -> LossAverage {
        self.config.train.loss_average
    }
}

impl Job {
    /// Checks a whole job for so many ranks. Unless tokens may be kept no file is created.
    pub fn inspect(config: Config, cache_use: CacheUse, n_ranks: usize) -> Result<Self> {
        let mut model = ModelSetup::inspect(config, n_ranks)?;
        let mut faults = Gather::default();
        let cache = match cache_use {
            CacheUse::Off => TokenCache::Off,
            CacheUse::Read => TokenCache::Read(&model.config.data.cache_dir),
            CacheUse::Judge | CacheUse::Keep => faults.take(model.config.cache_dir())?.map_or(
                TokenCache::Off,
                |CacheDir { folder, max_bytes, is_required, unwritable }| {
                    let is_usable = unwritable.is_none();
                    model.warnings.extend(unwritable);
                    match cache_use == CacheUse::Keep && is_usable {
                        true => TokenCache::Keep { folder, is_required, max_bytes },
                        false => TokenCache::Read(folder),
                    }
                },
            ),
        };
        let data = &model.config.data;
        // Validation first and never cached: when it is at fault, no file has been made yet.
        let mut validation = match data.validation.is_empty() {
            true => None,
            false => faults.take(model.validation_files())?,
        };
        let cache = if faults.0.is_empty() { cache } else { cache.read_only() };
        let all = faults.take(model.dataset(&data.train, cache))?;
        faults.finish()?;
        let Some(mut train) = all else {
            return Err(Error::failed("data", "is missing though no fault was found"));
        };
        if data.validation_fraction > 0.0 {
            let (learned, held_out) = train.split(data.validation_fraction, model.config.train.seed);
            if learned.is_empty() || held_out.is_empty() {
                let what = format!("{} of {} samples leaves one side empty", data.validation_fraction, train.len());
                return Err(Error::invalid("data.validation_fraction", what).hint("leave it out, or give more samples"));
            }
            validation = Some(train.select(&held_out));
            train = train.select(&learned);
        }
        for samples in [Some(&train), validation.as_ref()].into_iter().flatten() {
            model.has_label_tokens(samples)?;
        }
        let settings = &model.config.train;
        let steps_per_epoch = (train.len() as u64).div_ceil(settings.global_batch as u64);
        let total_steps = match settings.duration() {
            Duration::Epochs(epochs) => steps_per_epoch * u64::from(epochs),
            Duration::Steps(steps) => steps,
        };
        let warmup = match settings.warmup() {
            Warmup::Ratio(ratio) => warmup_updates(total_steps, ratio),
            Warmup::Steps(steps) => steps,
        };
        let (learning_rate, shape) = (settings.learning_rate, settings.schedule);
        let schedule = LrSchedule { learning_rate, shape, warmup, total: total_steps };
        Ok(Self { model, train, validation, total_steps, steps_per_epoch, schedule })
    }

    /// What the config, the model's files and the samples hold that may not be what the user means, though it is no fault.
    pub fn warnings(&self) -> impl Iterator<Item = &Fault> {
        // Held-out samples are of the training files.
        let validation = self.validation.as_ref().filter(|_| !self.model.config.data.validation.is_empty());
        let of_samples = std::iter::once(&self.train).chain(validation).flat_map(Dataset::warnings);
        self.model.warnings.iter().chain(of_samples)
    }

    /// What every update depends on.
    pub fn step_settings(&self) -> StepSettings {
        step_settings(&self.model.config, self.schedule)
    }

    /// The most that the run will write below its folder.
    pub fn run_bytes(&self) -> RunBytes {
        run_bytes(&self.model.config, &self.model.layout, Some(self.total_steps))
    }
}

/// What every update of a settled config depends on.
pub fn step_settings(config: &Config, schedule: LrSchedule) -> StepSettings {
    StepSettings {
        seed: config.train.seed,
        global_batch: config.train.global_batch,
        shuffle: config.data.shuffle,
        micro_batch_tokens: micro_batch_tokens(config),
        recompute: config.train.recompute == Auto::Is(config::Recompute::All),
        loss_average: config.train.loss_average,
        dropout: config.lora.dropout,
        max_grad_norm: config.train.max_grad_norm,
        max_non_finite: match config.train.non_finite {
            config::NonFinite::Stop => 0,
            config::NonFinite::Skip => config.train.max_non_finite,
        },
        schedule,
    }
}

/// The most that a run writes below its folder; one whose length is not known has as many checkpoints as may be.
pub fn run_bytes(config: &Config, layout: &Layout, total_steps: Option<u64>) -> RunBytes {
    let train = &config.train;
    let table_bytes = if train.save_dtype == config::Dtype::Fp32 { 4 } else { 2 };
    // One after the last step too; a run that saves none as it goes on still does when it is stopped.
    let saves = |steps: u64| steps.checked_div(train.checkpoint_every).map_or(0, |saves| saves + 1);
    let pinned = train.keep_steps.len() as u64;
    let kept = (train.keep_checkpoints + train.keep_best) as u64 + pinned;
    let checkpoints = (kept + 1).min(saves(total_steps.unwrap_or(u64::MAX - 1)).saturating_add(pinned)).max(1);
    RunBytes::new(layout.n_params() as u64, layout.n_table_params() as u64, table_bytes, checkpoints)
}

fn micro_batch_tokens(config: &Config) -> usize {
    match config.train.micro_batch_tokens {
        Auto::Is(tokens) => tokens,
        Auto::Auto => resolve_auto::CPU_MICRO_BATCH_TOKENS,
    }
}

/// The adapters of a config, whose names it has checked.
pub fn lora_spec(config: &Config) -> LoraSpec {
    let lora = &config.lora;
    let mut target_modules: Vec<Projection> =
        lora.target_modules.iter().filter_map(|n| Projection::from_name(n)).collect();
    let mut modules_to_save: Vec<Table> = lora.modules_to_save.iter().filter_map(|n| Table::from_name(n)).collect();
    target_modules.sort();
    modules_to_save.sort();
    LoraSpec {
        r: lora.r as i64,
        alpha: lora.alpha,
        dropout: lora.dropout,
        use_rslora: lora.use_rslora,
        target_modules,
        modules_to_save,
    }
}

fn template(config: &Config, tokenizer: &Tokenizer) -> Result<Prompting> {
    match &config.data.template {
        TemplateChoice::Alpaca => Ok(Template::alpaca().into()),
        TemplateChoice::ChineseAlpaca => Ok(Template::chinese_alpaca().into()),
        TemplateChoice::Chat => Prompting::of_tokenizer(tokenizer),
        TemplateChoice::File(path) => Prompting::read(path, tokenizer),
    }
}
