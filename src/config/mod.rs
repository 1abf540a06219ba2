//! The configuration of a run: a TOML file and `--set` overrides, resolved to values that are all concrete.
//!
//! [`Config::load`] reports every fault of the input at once. After it nothing is optional merely to mean "default":
//! an [`Option`] left here (`init_adapter`) is a feature that is off, and [`Auto`] is a value that only the run can
//! settle (it depends on the machine).

mod changes;
mod choices;
mod file_kinds;
mod foreign;
mod globs;
mod keys;
mod kinds;
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
use keys::SECTIONS;
use of_run::Unwritable;

pub use changes::{Difference, Meaning, values_of};
pub use choices::{Device, Dtype, NonFinite, Recompute};
pub use keys::{DataConfig, Fallback, KEYS, Key, LoraConfig, ModelConfig, TrainConfig};
pub use kinds::Named;
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

/// Gives what is known of a key.
fn find(key: &str) -> Option<&'static Key> {
    KEYS.iter().find(|known| known.name == key)
}

impl TrainConfig {
    /// How long to train.
    pub fn duration(&self) -> Duration {
        self.max_steps.map_or(Duration::Epochs(self.epochs), Duration::Steps)
    }

    /// How long the learning rate rises.
    pub fn warmup(&self) -> Warmup {
        self.warmup_steps.map_or(Warmup::Ratio(self.warmup_ratio), Warmup::Steps)
    }
}

impl DataConfig {
    /// Bytes that everything in the folder of tokens may take.
    pub fn cache_max_bytes(&self) -> u64 {
        self.cache_max_gb * 1_000_000_000
    }
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
        for key in KEYS.iter().filter(|key| (key.named)() != Named::Nothing) {
            raw.remove(key.name);
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
