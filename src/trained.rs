//! What `generate`, `eval` and `export` act on: a run directory, an adapter's folder, or a base model.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::checkpoint::adapter_file::{self, AdapterConfig};
use crate::checkpoint::manifest::{MANIFEST_FILE, newest_good};
use crate::config::{Dtype, ModelOfRun};
use crate::data::{Prompting, SpecialTokens, TemplateFile, Tokenizer};
use crate::device::{self, BF16_CAPABILITY, Cuda};
use crate::error::{Error, Fault, Result, shell_quoted};
use crate::formats::safetensors_in::TensorFiles;
use crate::model::arch::{self, ReadShape};
use crate::model::decoder::{Compute, Decoder};
use crate::model::lora::LoraSpec;
use crate::model::params::{Layout, ParamBuffer, table_key};
use crate::model::shape::{ModelShape, Table};
use crate::model::weights::{BaseWeights, check_base};
use crate::plan::MemoryModel;
use crate::run::folder::{CHECKPOINTS_DIR, CONFIG_FILE, finished_adapter, holds_run, verify_adapter};
use crate::torch::cuda::set_numerics;

/// An adapter on disk, opened.
pub struct OpenedAdapter {
    /// Its folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its tensors.
    pub files: TensorFiles,
    /// Rows of the tables with it.
    vocab_size: i64,
}

/// A base model, perhaps with an adapter, opened and checked but not loaded.
pub struct Trained {
    /// The base's folder.
    pub base_dir: PathBuf,
    /// The base's shape.
    pub base: ModelShape,
    /// The base's tensors.
    pub base_files: TensorFiles,
    /// The adapter on it.
    pub adapter: Option<OpenedAdapter>,
    /// What its files hold that may not be what the user means.
    pub warnings: Vec<Fault>,
    /// The dtype its run computed in, where there is a run.
    run_dtype: Option<Dtype>,
}

impl Trained {
    /// Opens a run directory (its final adapter, else its newest good checkpoint), an adapter's folder or a base model.
    ///
    /// `base` replaces the base that the adapter names; `allowed` names keys of the base's `config.json` that are passed over,
    /// beside those of the run.
    ///
    /// # Errors
    /// A path that is none of the three; a base or adapter with faults.
    pub fn open(path: &Path, base: Option<&Path>, allowed: &[String]) -> Result<Self> {
        let place = path.display().to_string();
        if !path.is_dir() {
            let what = if path.exists() { "is a file, not a folder" } else { "does not exist" };
            return Err(Error::invalid(place, what).hint(
                "name a run directory, an adapter's folder or a base model's folder; models are not downloaded",
            ));
        }
        if holds_run(path) {
            // Only what the model needs: the run's data may be elsewhere by now.
            let run = ModelOfRun::load(&path.join(CONFIG_FILE))?;
            let allowed = [allowed, &run.allow_config_keys].concat();
            let mut opened = Self::with_adapter(&newest_adapter(path)?, base.or(run.base.as_deref()), &allowed)?;
            opened.run_dtype = run.dtype;
            return Ok(opened);
        }
        if path.join(adapter_file::CONFIG_FILE).is_file() {
            return Self::with_adapter(path, base, allowed);
        }
        if path.join("config.json").is_file() {
            if base.is_some() {
                return Err(Error::invalid("--base", format!("{place} is a base itself")).hint("leave --base out"));
            }
            return Self::on_base(path, allowed);
        }
        Err(Error::invalid(
            place,
            "is no run directory (config.toml), adapter (adapter_config.json) or base (config.json)",
        )
        .hint("name a folder that holds one of these files"))
    }

    fn on_base(dir: &Path, allowed: &[String]) -> Result<Self> {
        let ReadShape { config: base, warnings } = arch::load(dir, allowed)?;
        let base_files = TensorFiles::open_model(dir)?;
        let faults = check_base(&base_files, &base);
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        Ok(Self { base_dir: dir.to_path_buf(), base, base_files, adapter: None, warnings, run_dtype: None })
    }

    fn with_adapter(dir: &Path, base: Option<&Path>, allowed: &[String]) -> Result<Self> {
        if dir.join(MANIFEST_FILE).is_file() {
            verify_adapter(dir)?;
        }
        let config = AdapterConfig::load(dir)?;
        let mut opened = Self::on_base(&base_of(dir, &config, base)?, allowed)?;
        let vocab_size = opened.grown_vocab_size(dir, &config.lora)?;
        let files = adapter_file::open_weights(dir, &Layout::new(&opened.base, &config.lora, vocab_size))?;
        opened.adapter = Some(OpenedAdapter { dir: dir.to_path_buf(), config, files, vocab_size });
        Ok(opened)
    }

    /// How far the vocabulary of an adapter goes: its trained tables say.
    fn grown_vocab_size(&self, dir: &Path, lora: &LoraSpec) -> Result<i64> {
        let path = dir.join(adapter_file::WEIGHTS_FILE);
        if lora.modules_to_save.is_empty() || !path.is_file() {
            return Ok(self.base.vocab_size);
        }
        let files = TensorFiles::open(&[path])?;
        let rows = |table: &Table| files.tensors().get(&table_key(*table))?.shape.first().copied();
        let Some(rows) = Table::ALL.iter().find_map(rows) else { return Ok(self.base.vocab_size) };
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        if rows != self.base.vocab_size && lora.modules_to_save.len() < Table::ALL.len() {
            let what = format!("has a table of {rows} rows, the base has {}", self.base.vocab_size);
            return Err(Error::invalid(dir.join(adapter_file::WEIGHTS_FILE).display().to_string(), what)
                .hint("an adapter that changes the vocabulary must hold both tables, embed_tokens and lm_head"));
        }
        Ok(rows)
    }

    /// The adapters, none for a bare base.
    pub fn lora(&self) -> LoraSpec {
        self.adapter.as_ref().map_or_else(LoraSpec::none, |a| a.config.lora.clone())
    }

    /// Rows of the tables, grown ones included.
    pub fn vocab_size(&self) -> i64 {
        self.adapter.as_ref().map_or(self.base.vocab_size, |a| a.vocab_size)
    }

    /// Where to compute: on a GPU where one can be used.
    pub fn device() -> Device {
        if matches!(device::cuda(), Cuda::Usable(_)) { Device::Cuda(0) } else { Device::Cpu }
    }

    /// Where the trained parameters stand in a flat buffer.
    pub fn layout(&self) -> Layout {
        Layout::new(&self.base, &self.lora(), self.vocab_size())
    }

    /// The parameters with the adapter's values, as products read them.
    pub fn params(&self, kind: Kind, device: Device) -> Result<ParamBuffer> {
        let mut params = ParamBuffer::new(self.layout(), kind, device)?;
        if let Some(adapter) = &self.adapter {
            adapter_file::load_into(&adapter.files, &mut params)?;
        }
        params.keep_for_reading()?;
        Ok(params)
    }

    /// The dtype to compute in: the one that is asked for, else the run's own, else the one that the base is stored in. A GPU
    /// without products in bf16 takes fp16 instead.
    pub fn kind(&self, asked: Option<Dtype>, device: Device) -> Kind {
        let has_bf16 = !device.is_cuda() || device::capability() >= BF16_CAPABILITY;
        match asked.or(self.run_dtype).or_else(|| stored_dtype(&self.base_files)) {
            Some(Dtype::Bf16) if has_bf16 => Kind::BFloat16,
            Some(Dtype::Bf16 | Dtype::Fp16) => Kind::Half,
            Some(Dtype::Fp32) | None => Kind::Float,
        }
    }

    /// The memory of the model.
    pub fn memory_model(&self, kind: Kind, device: Device) -> MemoryModel {
        MemoryModel::new(&self.base, &self.lora(), &self.layout(), kind, device, false)
    }

    /// Loads the model for texts of at most `max_positions` tokens, where its parameters are.
    pub fn load(&self, params: &ParamBuffer, kind: Kind, max_positions: i64) -> Result<Decoder> {
        set_numerics(false)?;
        let compute = Compute { kind, device: params.device(), max_positions };
        Decoder::load(&self.base, BaseWeights::Files(&self.base_files), &self.lora(), params, compute)
    }

    /// The folders that files may lie in beside the model: the adapter's before the base's.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.adapter.iter().map(|a| a.dir.as_path()).chain([self.base_dir.as_path()])
    }

    /// The tokenizer beside the adapter, else the base's.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let has_one = |dir: &&Path| ["tokenizer.model", "tokenizer.json"].iter().any(|name| dir.join(name).is_file());
        let dir = self.folders().find(has_one).unwrap_or(&self.base_dir);
        Tokenizer::open(dir).map_err(|error| {
            let hint = format!("put the tokenizer's files (tokenizer.json or tokenizer.model) into {}", dir.display());
            if has_one(&dir) { error.hint_where_none(&hint) } else { error.hint(hint) }
        })
    }

    /// The template and stop ids that travel with the model; else those of `fallback` with the tokenizer's own.
    pub fn template(&self, tokenizer: &Tokenizer, fallback: &dyn Fn() -> Result<Prompting>) -> Result<TemplateFile> {
        for dir in self.folders() {
            if let Some(template) = TemplateFile::load(dir)? {
                return Ok(template);
            }
        }
        let mut template = TemplateFile::new(&fallback()?, tokenizer, SpecialTokens::Special);
        template.stop_token_ids.extend(&self.base.eos_token_ids);
        Ok(template)
    }
}

/// The half-precision dtype that most of a base is stored in, if it is one.
pub fn stored_dtype(files: &TensorFiles) -> Option<Dtype> {
    match files.main_dtype() {
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        safetensors::Dtype::F16 => Some(Dtype::Fp16),
        _ => None,
    }
}

/// The folder of the base that an adapter is for: the one given, else the one that the adapter names.
fn base_of(dir: &Path, config: &AdapterConfig, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(base) = given {
        if base.is_dir() {
            return Ok(base.to_path_buf());
        }
        return Err(Error::invalid(base.display().to_string(), "the base is not there")
            .hint("give the base's folder by --base DIR; models are not downloaded"));
    }
    let place = dir.join(adapter_file::CONFIG_FILE).display().to_string();
    let Some(named) = &config.base else {
        return Err(Error::invalid(place, "names no base").hint("give the base's folder by --base DIR"));
    };
    // PEFT resolves a relative path by the working folder; beside the adapter is what people mean.
    [PathBuf::from(named), dir.join(named)].into_iter().find(|path| path.is_dir()).ok_or_else(|| {
        Error::invalid(place, format!("the base it names ({named}) is not a folder here"))
            .hint("give the base's folder by --base DIR; models are not downloaded")
    })
}

/// A run's final adapter, else its newest good checkpoint.
fn newest_adapter(run_dir: &Path) -> Result<PathBuf> {
    if let Some(adapter) = finished_adapter(run_dir) {
        return Ok(adapter);
    }
    match newest_good(&run_dir.join(CHECKPOINTS_DIR))?.good {
        Some((_, dir)) => Ok(dir),
        None => Err(Error::invalid(run_dir.display().to_string(), "has neither an adapter nor a whole checkpoint yet")
            .hint(format!("go on with it: bellora resume {}", shell_quoted(run_dir)))),
    }
}
