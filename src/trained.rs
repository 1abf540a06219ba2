//! What `generate`, `eval` and `export` act on: a run directory, an adapter's folder, or a base model.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::checkpoint::manifest::{newest_good, verify, MANIFEST_FILE};
use crate::config::{Auto, Config, Dtype};
use crate::data::{SpecialTokens, Template, TemplateFile, Tokenizer};
use crate::error::{Error, Result};
use crate::model::adapter_file::{self, AdapterConfig};
use crate::model::config::LlamaConfig;
use crate::model::llama::{Compute, Llama};
use crate::model::lora::{LoraSpec, Table};
use crate::model::params::{Layout, ParamBuffer, table_key};
use crate::model::weights::TensorFiles;
use crate::train::run::{CHECKPOINTS_DIR, CONFIG_FILE, finished_adapter, holds_run};

/// An adapter on disk, opened.
pub struct OpenedAdapter {
    /// Its folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its tensors.
    pub files: TensorFiles,
}

/// A base model, perhaps with an adapter, opened and checked but not loaded.
pub struct Trained {
    /// The base's folder.
    pub base_dir: PathBuf,
    /// The base's shape.
    pub base: LlamaConfig,
    /// The base's tensors.
    pub base_files: TensorFiles,
    /// The adapter on it.
    pub adapter: Option<OpenedAdapter>,
    /// The dtype its run computed in, where there is a run.
    run_dtype: Option<Dtype>,
}

impl Trained {
    /// Opens a run directory (its final adapter, else its newest good checkpoint), an adapter's folder or a base model.
    ///
    /// `base` replaces the base that the adapter names.
    ///
    /// # Errors
    /// A path that is none of the three; a base or adapter with faults.
    pub fn open(path: &Path, base: Option<&Path>) -> Result<Self> {
        let place = path.display().to_string();
        if !path.is_dir() {
            let what = if path.exists() { "is a file, not a folder" } else { "does not exist" };
            return Err(Error::invalid(place, what)
                .hint("name a run directory, an adapter's folder or a base model's folder; models are not downloaded"));
        }
        if holds_run(path) {
            let config = Config::load(&path.join(CONFIG_FILE), &[])?;
            let run_base = base.unwrap_or(&config.model.base).to_path_buf();
            let mut opened = Self::with_adapter(&newest_adapter(path)?, Some(&run_base))?;
            if let Auto::Is(dtype) = config.model.dtype {
                opened.run_dtype = Some(dtype);
            }
            return Ok(opened);
        }
        if path.join(adapter_file::CONFIG_FILE).is_file() {
            return Self::with_adapter(path, base);
        }
        if path.join("config.json").is_file() {
            return Self::on_base(path);
        }
        Err(Error::invalid(place, "is no run directory (config.toml), adapter (adapter_config.json) or base (config.json)")
            .hint("name a folder that holds one of these files"))
    }

    fn on_base(dir: &Path) -> Result<Self> {
        let base = LlamaConfig::load(dir)?;
        let base_files = TensorFiles::open_model(dir)?;
        let faults = base_files.check_llama(&base);
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        Ok(Self { base_dir: dir.to_path_buf(), base, base_files, adapter: None, run_dtype: None })
    }

    fn with_adapter(dir: &Path, base: Option<&Path>) -> Result<Self> {
        if dir.join(MANIFEST_FILE).is_file() {
            verify(dir)?;
        }
        let config = AdapterConfig::load(dir)?;
        let base_dir = match (base, &config.base) {
            (Some(base), _) => base.to_path_buf(),
            // PEFT resolves a relative path by the working folder; beside the adapter is what people mean.
            (None, Some(named)) if Path::new(named).is_dir() => PathBuf::from(named),
            (None, Some(named)) if dir.join(named).is_dir() => dir.join(named),
            (None, named) => {
                let named = named.as_deref().unwrap_or("none");
                let place = dir.join(adapter_file::CONFIG_FILE).display().to_string();
                return Err(Error::invalid(place, format!("the base it names ({named}) is not a folder here"))
                    .hint("give the base's folder by --base DIR"));
            }
        };
        let mut opened = Self::on_base(&base_dir)?;
        let path = dir.join(adapter_file::WEIGHTS_FILE);
        let files = TensorFiles::open(&[path])?;
        let adapter = OpenedAdapter { dir: dir.to_path_buf(), config, files };
        let faults = adapter_file::check(&adapter.files, &opened.layout_with(&adapter));
        if !faults.is_empty() {
            return Err(Error::Invalid(faults).hint("does this adapter belong to this base? --base DIR names another"));
        }
        opened.adapter = Some(adapter);
        Ok(opened)
    }

    /// The adapters, none for a bare base.
    pub fn lora(&self) -> LoraSpec {
        self.adapter.as_ref().map_or_else(LoraSpec::none, |a| a.config.lora.clone())
    }

    /// Rows of the tables: a trained table says how far the vocabulary grew.
    pub fn vocab_size(&self) -> i64 {
        self.adapter.as_ref().map_or(self.base.vocab_size, |a| self.vocab_size_with(a))
    }

    fn vocab_size_with(&self, adapter: &OpenedAdapter) -> i64 {
        let rows = |table: &Table| adapter.files.tensors().get(&table_key(*table)).map(|t| t.shape[0] as i64);
        Table::ALL.iter().find_map(rows).unwrap_or(self.base.vocab_size)
    }

    fn layout_with(&self, adapter: &OpenedAdapter) -> Layout {
        Layout::new(&self.base, &adapter.config.lora, self.vocab_size_with(adapter))
    }

    /// The parameters with the adapter's values.
    pub fn params(&self, kind: Kind) -> Result<ParamBuffer> {
        let layout = Layout::new(&self.base, &self.lora(), self.vocab_size());
        let mut params = ParamBuffer::new(layout, kind, Device::Cpu)?;
        if let Some(adapter) = &self.adapter {
            adapter_file::load_into(&adapter.files, &mut params)?;
        }
        Ok(params)
    }

    /// The dtype to compute in: the run's own, else the base's where the CPU is quick in it, else fp32.
    pub fn kind(&self) -> Kind {
        match self.run_dtype {
            Some(Dtype::Bf16) => Kind::BFloat16,
            Some(_) => Kind::Float,
            None if self.base_files.main_dtype() == safetensors::Dtype::BF16 && has_bf16_products() => Kind::BFloat16,
            None => Kind::Float,
        }
    }

    /// Loads the model for texts of at most `max_positions` tokens.
    pub fn load(&self, params: &ParamBuffer, kind: Kind, max_positions: i64) -> Result<Llama> {
        let compute = Compute { kind, device: Device::Cpu, max_positions };
        Llama::load(&self.base, &self.base_files, &self.lora(), params, compute)
    }

    /// The tokenizer beside the adapter, else the base's.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if let Some(adapter) = &self.adapter {
            let has = |name: &str| adapter.dir.join(name).is_file();
            if has("tokenizer.model") || has("tokenizer.json") {
                return Tokenizer::open(&adapter.dir);
            }
        }
        Tokenizer::open(&self.base_dir)
    }

    /// The template and stop ids that travel with the adapter; else those of `fallback` with the tokenizer's own.
    pub fn template(&self, tokenizer: &Tokenizer, fallback: &Template) -> Result<TemplateFile> {
        if let Some(adapter) = &self.adapter
            && let Some(template) = TemplateFile::load(&adapter.dir)?
        {
            return Ok(template);
        }
        let mut template = TemplateFile::new(fallback, tokenizer, SpecialTokens::Special);
        template.stop_token_ids.extend(&self.base.eos_token_ids);
        Ok(template)
    }
}

/// A run's final adapter, else its newest good checkpoint.
fn newest_adapter(run_dir: &Path) -> Result<PathBuf> {
    if let Some(adapter) = finished_adapter(run_dir) {
        return Ok(adapter);
    }
    match newest_good(&run_dir.join(CHECKPOINTS_DIR))?.good {
        Some((_, dir)) => Ok(dir),
        None => Err(Error::invalid(run_dir.display().to_string(), "has neither an adapter nor a whole checkpoint yet")
            .hint(format!("go on with it: bellora resume {}", run_dir.display()))),
    }
}

fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}
