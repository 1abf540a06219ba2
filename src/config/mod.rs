//! The configuration of a run: a TOML file and `--set` overrides, resolved to values that are all concrete.
//!
//! [`Config::load`] reports every fault of the input at once. After it nothing is optional merely to mean "default":
//! an [`Option`] left here (`init_adapter`) is a feature that is off, and [`Auto`] is a value that only the run can
//! settle (it depends on the machine).

mod changes;
mod choices;
mod foreign;
mod globs;
mod of_run;
mod paths;
mod print;
mod problem;
mod raw;
mod reader;
mod resolve;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Fault, Result};
use of_run::Unwritable;

pub use changes::{Difference, Meaning, values_of};
pub use choices::{
    Device, Dtype, Learn, LossAverage, NewRows, NonFinite, Recompute, SaveDtype, Schedule, SpecialTokens, Truncation,
};
pub use of_run::{CacheDir, ModelOfRun};

/// Everything the user can set, resolved.
///
/// Two configs are equal when their values are; which of them were spelt out and which are defaults does not count.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[model]`: the base model and how it is loaded.
    pub model: ModelConfig,
    /// `[lora]`: which weights are adapted and how.
    pub lora: LoraConfig,
    /// `[data]`: the samples and how they become tokens.
    pub data: DataConfig,
    /// `[train]`: the updates, and what is written when.
    pub train: TrainConfig,
    /// What may not be what the user means, though it is no fault.
    pub warnings: Vec<Fault>,
    /// Why a place cannot be written, for the commands that write there.
    unwritable: Unwritable,
    /// The keys the user gave, as `section.key`; the others are defaults.
    given: BTreeSet<&'static str>,
}

impl PartialEq for Config {
    fn eq(&self, other: &Self) -> bool {
        self.model == other.model && self.lora == other.lora && self.data == other.data && self.train == other.train
    }
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The base model: a folder in Hugging Face's layout.
    pub base: PathBuf,
    /// A folder with tokenizer files, a `tokenizer.json`, or a SentencePiece `.model` file.
    pub tokenizer: PathBuf,
    /// The type of frozen weights and activations.
    pub dtype: Auto<Dtype>,
    /// Where to compute.
    pub device: Auto<Device>,
    /// The folder of an adapter to start from.
    pub init_adapter: Option<PathBuf>,
    /// Whether the vocabulary may be grown to the tokenizer's.
    pub resize_vocab: bool,
    /// What new rows of a grown vocabulary begin as.
    pub new_rows: NewRows,
    /// Keys of the base's `config.json` that are passed over though they might change what it computes.
    pub allow_config_keys: Vec<String>,
}

/// `[lora]`, in the names of PEFT.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// The rank.
    pub r: usize,
    /// The scale's numerator: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub alpha: f64,
    /// The share of a LoRA input's channels set to zero while training, in [0, 1).
    pub dropout: f64,
    /// The adapted projections: at least one of [`TARGET_MODULES`], each once, in that order.
    pub target_modules: Vec<String>,
    /// The tables trained whole: any of [`SAVED_MODULES`], each once, in that order.
    pub modules_to_save: Vec<String>,
    /// Whether the scale is rank-stabilised.
    pub use_rslora: bool,
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    /// The training files, at least one; globs are expanded and each glob's files sorted.
    pub train: Vec<PathBuf>,
    /// The validation files; empty when there are none.
    pub validation: Vec<PathBuf>,
    /// The share of the training samples held out for validation, in [0, 1); 0 when `validation` has files.
    pub validation_fraction: f64,
    /// The text around instruction and answer.
    pub template: TemplateChoice,
    /// Which answers of a conversation are learned: every one with a chat template, else the last, where it is `auto`.
    pub learn: Auto<Learn>,
    /// The longest sample, in tokens.
    pub max_length: usize,
    /// What happens to a longer one.
    pub truncation: Truncation,
    /// What a special token written in a text becomes.
    pub special_tokens: SpecialTokens,
    /// Whether every epoch has a new seeded order; else file order.
    pub shuffle: bool,
    /// How many unreadable rows are tolerated before the data is refused.
    pub max_bad_rows: u64,
    /// Where tokenised data is kept between runs.
    pub cache_dir: PathBuf,
    /// Bytes that everything in that folder may take.
    pub cache_max_bytes: u64,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// The run directory.
    pub output: PathBuf,
    /// How long to train (`epochs` or `max_steps`).
    pub duration: Duration,
    /// Samples an update, over all ranks.
    pub global_batch: usize,
    /// The most tokens one micro-batch holds; at least `data.max_length`.
    pub micro_batch_tokens: Auto<usize>,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// The shape of the learning rate after the warmup.
    pub schedule: Schedule,
    /// How long the learning rate rises (`warmup_ratio` or `warmup_steps`).
    pub warmup: Warmup,
    /// AdamW's decoupled decay.
    pub weight_decay: f64,
    /// AdamW's two decay rates.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub eps: f64,
    /// The gradient's largest L2 norm; 0 does not clip.
    pub max_grad_norm: f64,
    /// Over what the loss is averaged.
    pub loss_average: LossAverage,
    /// Samples a group, for [`LossAverage::Samples`].
    pub loss_group_samples: usize,
    /// The seed of order, dropout and new weights.
    pub seed: u64,
    /// Which activations are computed again in backward.
    pub recompute: Auto<Recompute>,
    /// Whether each rank holds a part of the optimizer's state only (ZeRO-1).
    pub shard: Auto<bool>,
    /// Whether a GPU takes only ops whose sums have a fixed order.
    pub deterministic: bool,
    /// What follows a loss or gradient that is not finite, where no loss scale can mend it.
    pub non_finite: NonFinite,
    /// How many updates of the run [`NonFinite::Skip`] may pass over.
    pub max_non_finite: u64,
    /// Updates between checkpoints; 0 is never.
    pub checkpoint_every: u64,
    /// How many of the newest checkpoints stay, at least 1.
    pub keep_checkpoints: usize,
    /// How many of the checkpoints with the lowest evaluation loss stay.
    pub keep_best: usize,
    /// Steps that are saved and whose checkpoints stay.
    pub keep_steps: Vec<u64>,
    /// Updates between evaluations; 0 is never.
    pub eval_every: u64,
    /// Updates between lines on the console and points in TensorBoard; 0 is never.
    pub log_every: u64,
    /// The type of the trained tables in the final `adapter/`; LoRA weights and checkpoints are always fp32.
    pub save_dtype: SaveDtype,
}

/// A value, or the program's own choice on the machine at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auto<T> {
    /// Settled when the run starts, if there is a choice then, and written to its config.
    Auto,
    /// Settled by the user.
    Is(T),
}

impl<T> Auto<T> {
    /// The value, where there is one already.
    pub fn settled(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Is(value) => Some(value),
        }
    }
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duration {
    /// Whole passes over the training samples.
    Epochs(u32),
    /// Updates; they may span epochs or end within one.
    Steps(u64),
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A share of all updates, in [0, 1].
    Ratio(f64),
    /// Updates.
    Steps(u64),
}

/// Where the strings around instruction and answer come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateChoice {
    /// The built-in `alpaca`.
    Alpaca,
    /// The built-in `chinese-alpaca`.
    ChineseAlpaca,
    /// The chat template in the tokenizer's own files.
    Chat,
    /// A template file of the user's: strings (`.toml`), or a chat template (`.jinja`).
    File(PathBuf),
}

/// The projections LoRA can adapt, in the model's order.
pub const TARGET_MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// The tables that can be trained whole.
pub const SAVED_MODULES: [&str; 2] = ["embed_tokens", "lm_head"];

/// The sections, in the order they are written.
const SECTIONS: [&str; 4] = ["model", "lora", "data", "train"];

/// The keys that say what the updates compute, up to rounding. A resumed run must agree in them.
const DEFINING_KEYS: [&str; 28] = [
    "model.dtype",
    "model.init_adapter",
    "model.resize_vocab",
    "model.new_rows",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.modules_to_save",
    "lora.use_rslora",
    "data.validation_fraction",
    "data.learn",
    "data.max_length",
    "data.truncation",
    "data.special_tokens",
    "data.shuffle",
    "train.global_batch",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_ratio",
    "train.warmup_steps",
    "train.weight_decay",
    "train.betas",
    "train.eps",
    "train.max_grad_norm",
    "train.loss_average",
    "train.loss_group_samples",
    "train.seed",
];

/// The keys that name files whose contents define the run: they may lie elsewhere when it is resumed.
const CONTENTS_KEYS: [&str; 4] = ["model.base", "model.tokenizer", "data.train", "data.template"];

/// The keys that say how long the run is.
const LENGTH_KEYS: [&str; 2] = ["train.epochs", "train.max_steps"];

/// The keys that decide how sums are rounded and change nothing else.
const ROUNDING_KEYS: [&str; 5] =
    ["model.device", "train.micro_batch_tokens", "train.recompute", "train.shard", "train.deterministic"];

/// The keys that only say where, when, and what is kept.
const EXECUTION_KEYS: [&str; 15] = [
    "model.allow_config_keys",
    "data.validation",
    "data.max_bad_rows",
    "data.cache_dir",
    "data.cache_max_gb",
    "train.output",
    "train.non_finite",
    "train.max_non_finite",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.keep_steps",
    "train.eval_every",
    "train.log_every",
    "train.save_dtype",
];

/// The keys that name files and folders.
const FILE_KEYS: [&str; 8] = [
    "model.base",
    "model.tokenizer",
    "model.init_adapter",
    "data.train",
    "data.validation",
    "data.template",
    "data.cache_dir",
    "train.output",
];

/// Gives every key there is, as `section.key`.
fn known_keys() -> impl Iterator<Item = &'static str> {
    DEFINING_KEYS.into_iter().chain(CONTENTS_KEYS).chain(LENGTH_KEYS).chain(ROUNDING_KEYS).chain(EXECUTION_KEYS)
}

impl Config {
    /// Reads a config file and applies `--set section.key=value` overrides in their order, for a command that writes where
    /// the config says.
    ///
    /// Relative paths mean the working folder and come out absolute; globs come out as the files they match.
    ///
    /// # Errors
    /// [`Error::Invalid`] with all faults: an unreadable file, TOML that does not parse, unknown and missing keys,
    /// wrong types and ranges, contradictions, paths that do not exist, and places that cannot be written.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        Self::parse(&read(path)?, &path.display().to_string(), sets)
    }

    /// Resolves the text of a config file; `name` stands for the file in messages.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, name: &str, sets: &[String]) -> Result<Self> {
        let mut faults = Faults::default();
        let config = Self::resolved(text, name, sets, &mut faults)?;
        faults.found.extend(config.unwritable.as_faults());
        faults.into_result(config)
    }

    /// Reads a config file as [`Config::load`] does, for a command that writes nothing there.
    ///
    /// # Errors
    /// As [`Config::load`], but for places that cannot be written.
    pub fn load_to_read(path: &Path, sets: &[String]) -> Result<Self> {
        Self::parse_to_read(&read(path)?, &path.display().to_string(), sets)
    }

    /// Resolves the text of a config file, for a process that writes nothing where it says.
    ///
    /// # Errors
    /// As [`Config::load_to_read`].
    pub fn parse_to_read(text: &str, name: &str, sets: &[String]) -> Result<Self> {
        let mut faults = Faults::default();
        let config = Self::resolved(text, name, sets, &mut faults)?;
        faults.into_result(config)
    }

    fn resolved(text: &str, name: &str, sets: &[String], faults: &mut Faults) -> Result<Self> {
        let mut raw = raw::read(text, name, faults)?;
        raw.apply_sets(sets, faults);
        Ok(resolve::resolve(raw, FileKeys::Required, faults))
    }

    /// Reads a config for a model and samples that are not on disk: the keys that name files are passed over, the
    /// others say what they always do. Without a file they are `sets` over the defaults.
    ///
    /// # Errors
    /// As [`Config::load`], of the keys that count.
    pub fn load_without_files(path: Option<&Path>, sets: &[String]) -> Result<Self> {
        let (text, name) = match path {
            Some(path) => (read(path)?, path.display().to_string()),
            None => (String::new(), "the defaults".to_owned()),
        };
        let mut faults = Faults::default();
        let mut raw = raw::read(&text, &name, &mut faults)?;
        raw.apply_sets(sets, &mut faults);
        for key in FILE_KEYS {
            raw.remove(key);
        }
        let config = resolve::resolve(raw, FileKeys::PassedOver, &mut faults);
        faults.into_result(config)
    }
}

/// Reads the text of a config file.
fn read(path: &Path) -> Result<String> {
    let place = path.display().to_string();
    let text = std::fs::read(path).map_err(|source| {
        let fault = Error::invalid(&place, format!("the config file cannot be read: {source}"));
        match path.is_dir() {
            true if path.join("config.toml").is_file() => {
                fault.hint(format!("this is a folder: name the file in it, {}", path.join("config.toml").display()))
            }
            true => fault.hint("this is a folder: name a TOML file"),
            false => fault.hint("the first argument is the path of a TOML file, relative to the working folder"),
        }
    })?;
    String::from_utf8(text).map_err(|_| Error::invalid(&place, "not a text in UTF-8").hint("save the config as UTF-8"))
}

/// What becomes of the keys that name files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileKeys {
    /// Those that have no default must be given.
    Required,
    /// All but the training samples must be.
    WithoutTraining,
    /// None is there, and none is missed.
    PassedOver,
}

/// The faults met so far, each with the line it is on.
#[derive(Default)]
struct Faults {
    found: Vec<(usize, Fault)>,
    /// Keys that the hint for an unknown key proposed: their absence is not a second fault.
    proposed: BTreeSet<&'static str>,
}

impl Faults {
    /// Remembers a fault; `line` orders the report (`usize::MAX`: on no line of the file).
    fn add(&mut self, line: usize, fault: Fault) {
        self.found.push((line, fault));
    }

    fn into_result<T>(mut self, value: T) -> Result<T> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by_key(|(line, _)| *line);
        Err(Error::Invalid(self.found.into_iter().map(|(_, fault)| fault).collect()))
    }
}
