//! From what the user wrote to values: each key by its entry, and the rules between keys.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::raw::{Given, Raw};
use super::reader::Reader;
use super::{
    Auto, Config, DataConfig, Faults, FileKeys, LoraConfig, ModelConfig, SAVED_MODULES, TrainConfig, Unwritable, paths,
};
use crate::data::LossAverage;

/// Makes the config; what is at fault is replaced by its default, so that the rest can be judged too.
pub(super) fn resolve(raw: Raw, file_keys: FileKeys, faults: &mut Faults) -> Config {
    let mut reader = Reader::new(raw, file_keys, faults);
    let mut config = Config {
        model: ModelConfig::read(&mut reader),
        lora: LoraConfig::read(&mut reader),
        data: DataConfig::read(&mut reader),
        train: TrainConfig::read(&mut reader),
        warnings: Vec::new(),
        unwritable: Unwritable::default(),
        given: reader.raw.keys().collect(),
    };
    if let LossAverage::Samples { group } = &mut config.train.loss_average {
        *group = config.train.loss_group_samples;
    }
    validate_by_one(&mut config.data, &mut reader);
    config.unwritable = Unwritable {
        output: reader.unwritable("train.output", &config.train.output),
        cache_dir: reader.unwritable("data.cache_dir", &config.data.cache_dir),
        cache_is_wished: reader.raw.get("data.cache_dir").is_some(),
    };
    rules(&config, &mut reader);
    reader.name_defaults(&config);
    config.warnings = reader.warnings;
    config
}

/// Keeps either validation files or a share of the samples, and compares the files with those that are learned.
fn validate_by_one(data: &mut DataConfig, reader: &mut Reader<'_>) {
    if !data.validation.is_empty() && data.validation_fraction > 0.0 {
        let is_set = |key| reader.raw.get(key).is_some_and(Given::is_set);
        match (is_set("data.validation"), is_set("data.validation_fraction")) {
            (true, false) => data.validation_fraction = 0.0,
            (false, true) => data.validation.clear(),
            _ => {
                let what = "data.validation names files, and samples are to be held out as well";
                reader.fault("data.validation_fraction", what, "keep one of the two");
            }
        }
    }
    let learned: BTreeSet<PathBuf> = data.train.iter().map(|file| paths::real(file)).collect();
    if let Some(file) = data.validation.iter().find(|file| learned.contains(&paths::real(file))) {
        let what =
            format!("{} is in data.train as well: what is learned says little when evaluated on", file.display());
        let hint = "evaluate on rows that are not trained on, or set data.validation_fraction";
        reader.warn("data.validation", what, hint);
    }
}

/// Judges what no single key can show.
fn rules(config: &Config, reader: &mut Reader<'_>) {
    let max_length = config.data.max_length;
    if let Auto::Is(tokens) = config.train.micro_batch_tokens
        && tokens < max_length
        && reader.is_sure("data.max_length")
    {
        let what = format!("expected at least data.max_length = {max_length}, found {tokens}: one sample must fit");
        reader.fault("train.micro_batch_tokens", what, "raise it, lower data.max_length, or write \"auto\"");
    }
    let train = &config.train;
    let is_evaluated = train.eval_every > 0 && train.checkpoint_every.is_multiple_of(train.eval_every);
    let has_validation = !config.data.validation.is_empty() || config.data.validation_fraction > 0.0;
    let counts = train.keep_best > 0 && reader.file_keys == FileKeys::Required;
    if counts && !(is_evaluated && train.checkpoint_every > 0 && has_validation) {
        let what = "the best checkpoints are those of the lowest evaluation loss, and they are not evaluated";
        let hint = "give data.validation or data.validation_fraction, and a checkpoint_every that is a multiple of \
                    eval_every; or leave keep_best out";
        reader.fault("train.keep_best", what, hint);
    }
    let missing: Vec<_> = SAVED_MODULES
        .into_iter()
        .filter(|table| !config.lora.modules_to_save.iter().any(|saved| saved == table))
        .collect();
    if config.model.resize_vocab && !missing.is_empty() && reader.is_sure("lora.modules_to_save") {
        let what = format!(
            "a grown vocabulary needs both tables trained, and lora.modules_to_save lacks {}: its new random rows \
             would be lost on export",
            missing.join(" and ")
        );
        let hint = "write modules_to_save = [\"embed_tokens\", \"lm_head\"] under [lora], or resize_vocab = false";
        reader.fault("model.resize_vocab", what, hint);
    }
}
