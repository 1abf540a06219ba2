//! The parts of a model that a config names, opened and held against each other.

use std::path::Path;

use crate::checkpoint::adapter_file::{self, AdapterConfig};
use crate::config::Config;
use crate::data::Tokenizer;
use crate::error::{Error, Fault, Result};
use crate::formats::safetensors_in::TensorFiles;
use crate::model::lora::LoraSpec;
use crate::model::params::Layout;
use crate::model::shape::{ModelShape, Table};

pub(super) fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::open(path).map_err(|error| {
        error.hint_where_none("download the tokenizer's files again, or set model.tokenizer to others")
    })
}

/// The rows of the tables: the base's, or the tokenizer's where it may grow them.
pub(super) fn vocab_size(config: &Config, base: &ModelShape, tokenizer: &Tokenizer, lora: &LoraSpec) -> Result<i64> {
    let tokens = tokenizer.vocab_size() as i64;
    if tokens <= base.vocab_size {
        return Ok(base.vocab_size);
    }
    if !config.model.resize_vocab {
        let what = format!(
            "has {tokens} tokens, but the embedding table of {} has {} rows",
            config.model.base.display(),
            base.vocab_size
        );
        return Err(Error::invalid(tokenizer.place(), what).hint(
            "if the vocabulary is meant to grow, set model.resize_vocab = true and \
             lora.modules_to_save = [\"embed_tokens\", \"lm_head\"]; else model.tokenizer or model.base is the wrong one",
        ));
    }
    if Table::ALL.iter().any(|t| !lora.trains(*t)) {
        let what = format!("the vocabulary grows from {} to {tokens}, so both tables must be trained", base.vocab_size);
        return Err(Error::invalid("lora.modules_to_save", what)
            .hint("write modules_to_save = [\"embed_tokens\", \"lm_head\"]: new rows would be lost on export"));
    }
    Ok(tokens)
}

/// Opens an adapter to start from and holds its configuration against the run's.
pub(super) fn open_init_adapter(dir: &Path, lora: &LoraSpec, layout: &Layout) -> Result<TensorFiles> {
    let theirs = AdapterConfig::load(dir)?.lora;
    let mut faults = Vec::new();
    let mut compare = |key: &str, ours: String, theirs: String| {
        if ours != theirs {
            let what = format!("the config has {ours}, {} has {theirs}", dir.join(adapter_file::CONFIG_FILE).display());
            let hint = "make the two equal, or leave model.init_adapter out";
            faults.push(Fault::new(format!("lora.{key}"), what).hint(hint));
        }
    };
    compare("r", lora.r.to_string(), theirs.r.to_string());
    compare("alpha", lora.alpha.to_string(), theirs.alpha.to_string());
    compare("use_rslora", lora.use_rslora.to_string(), theirs.use_rslora.to_string());
    let projections = |l: &LoraSpec| format!("{:?}", l.target_modules.iter().map(|p| p.name()).collect::<Vec<_>>());
    compare("target_modules", projections(lora), projections(&theirs));
    let tables = |l: &LoraSpec| format!("{:?}", l.modules_to_save.iter().map(|t| t.name()).collect::<Vec<_>>());
    compare("modules_to_save", tables(lora), tables(&theirs));
    if !faults.is_empty() {
        return Err(Error::Invalid(faults));
    }
    adapter_file::open_weights(dir, layout)
}
