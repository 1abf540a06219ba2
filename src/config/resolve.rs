//! From what the user wrote to values: every default, type, range and rule of the config.

use std::collections::BTreeSet;

use super::raw::{Given, Raw};
use super::reader::Reader;
use super::{
    Auto, Config, DataConfig, Duration, Faults, FileKeys, LoraConfig, LossAverage, ModelConfig, NewRows, NonFinite,
    SAVED_MODULES, SaveDtype, Schedule, SpecialTokens, TARGET_MODULES, TemplateChoice, TrainConfig, Truncation,
    Unwritable, Warmup, paths,
};
use crate::error::Fault;

/// A rank beyond the width of any projection adds nothing.
const LARGEST_RANK: u64 = 1 << 16;

/// Eight times the longest context of any Llama; tables of rotations for it still fit in memory.
const LONGEST_SAMPLE: u64 = 1 << 20;

/// More updates, epochs, samples or checkpoints than any job has; so that products of two of them can be counted.
const MOST_STEPS: u64 = 1 << 40;
const MOST_EPOCHS: u64 = 1 << 20;
const MOST_SAMPLES: u64 = 1 << 30;
const MOST_CHECKPOINTS: u64 = 1 << 20;
const MOST_GB: u64 = 1 << 20;
/// Bytes of a gigabyte.
pub(super) const GB: u64 = 1_000_000_000;

/// Makes the config; what is at fault is replaced by its default, so that the rest can be judged too.
pub(super) fn resolve(raw: Raw, file_keys: FileKeys, faults: &mut Faults) -> Config {
    let mut reader =
        Reader { raw, file_keys, faults, faulty: BTreeSet::new(), without_hint: Vec::new(), warnings: Vec::new() };
    let model = model(&mut reader);
    let lora = lora(&mut reader);
    let data = data(&mut reader);
    let train = train(&mut reader);
    let given: BTreeSet<_> = reader.raw.keys().collect();
    let unwritable = Unwritable {
        output: reader.unwritable("train.output", &train.output),
        cache_dir: reader.unwritable("data.cache_dir", &data.cache_dir),
        cache_is_wished: reader.raw.get("data.cache_dir").is_some(),
    };
    let config = Config { model, lora, data, train, warnings: std::mem::take(&mut reader.warnings), unwritable, given };
    rules(&config, &mut reader);
    reader.name_defaults(&config);
    config
}

fn model(reader: &mut Reader<'_>) -> ModelConfig {
    let base = reader.required("model.base", "base = \"models/Llama-2-7b-hf\"", paths::base).unwrap_or_default();
    ModelConfig {
        tokenizer: reader.path("model.tokenizer", paths::tokenizer).unwrap_or_else(|| base.clone()),
        base,
        dtype: reader.auto_choice("model.dtype"),
        device: reader.auto_choice("model.device"),
        init_adapter: reader.path("model.init_adapter", paths::adapter),
        resize_vocab: reader.bool("model.resize_vocab").unwrap_or(false),
        new_rows: reader.choice("model.new_rows").unwrap_or(NewRows::Normal),
        allow_config_keys: reader.texts("model.allow_config_keys").unwrap_or_default(),
    }
}

fn lora(reader: &mut Reader<'_>) -> LoraConfig {
    let all = || TARGET_MODULES.map(str::to_owned).to_vec();
    let target_modules = reader.names("lora.target_modules", &TARGET_MODULES);
    if target_modules.as_ref().is_some_and(Vec::is_empty) {
        let fault =
            Fault::new(reader.raw.place("lora.target_modules"), "expected at least one name, found an empty list");
        reader.fault("lora.target_modules", fault.hint("leave it out for all seven projections"));
    }
    LoraConfig {
        r: reader.integer_up_to("lora.r", 1, LARGEST_RANK).map_or(64, |r| r as usize),
        alpha: reader.float("lora.alpha", "a number greater than 0", |alpha| alpha > 0.0).unwrap_or(128.0),
        dropout: reader.share("lora.dropout").unwrap_or(0.05),
        target_modules: target_modules.unwrap_or_else(all),
        modules_to_save: reader.names("lora.modules_to_save", &SAVED_MODULES).unwrap_or_default(),
        use_rslora: reader.bool("lora.use_rslora").unwrap_or(false),
    }
}

fn data(reader: &mut Reader<'_>) -> DataConfig {
    let train = reader.files("data.train");
    if train.as_ref().is_none_or(Vec::is_empty) && reader.file_keys != FileKeys::WithoutTraining {
        reader.missing("data.train", "train = [\"data/train.jsonl\"]");
    }
    let mut validation = reader.files("data.validation").unwrap_or_default();
    let mut validation_fraction = reader.share("data.validation_fraction").unwrap_or(0.0);
    if !validation.is_empty() && validation_fraction > 0.0 {
        let is_set = |key| reader.raw.get(key).is_some_and(Given::is_set);
        match (is_set("data.validation"), is_set("data.validation_fraction")) {
            (true, false) => validation_fraction = 0.0,
            (false, true) => validation.clear(),
            _ => {
                let place = reader.raw.place("data.validation_fraction");
                let fault = Fault::new(place, "data.validation names files, and samples are to be held out as well");
                reader.fault("data.validation_fraction", fault.hint("keep one of the two"));
            }
        }
    }
    reader.compare_files(train.as_deref().unwrap_or_default(), &validation);
    DataConfig {
        train: train.unwrap_or_default(),
        validation,
        validation_fraction,
        template: reader.template().unwrap_or(TemplateChoice::Alpaca),
        learn: reader.auto_choice("data.learn"),
        // The first token of a sample is never learned, so that a sample of one token has no use.
        max_length: reader.integer_up_to("data.max_length", 2, LONGEST_SAMPLE).map_or(512, |length| length as usize),
        truncation: reader.choice("data.truncation").unwrap_or(Truncation::Drop),
        special_tokens: reader.choice("data.special_tokens").unwrap_or(SpecialTokens::Special),
        shuffle: reader.bool("data.shuffle").unwrap_or(true),
        max_bad_rows: reader.integer_up_to("data.max_bad_rows", 0, MOST_STEPS).unwrap_or(0),
        cache_dir: reader.path("data.cache_dir", paths::place).unwrap_or_else(paths::user_cache_dir),
        cache_max_bytes: GB * reader.integer_up_to("data.cache_max_gb", 1, MOST_GB).unwrap_or(50),
    }
}

fn train(reader: &mut Reader<'_>) -> TrainConfig {
    let above_zero = |number: f64| number > 0.0;
    let from_zero = |number: f64| number >= 0.0;
    let epochs = reader.integer_up_to("train.epochs", 1, MOST_EPOCHS);
    let max_steps = reader.integer_up_to("train.max_steps", 1, MOST_STEPS);
    let warmup_ratio = reader.float("train.warmup_ratio", "a share from 0 to 1", |share| (0.0..=1.0).contains(&share));
    let warmup_steps = reader.integer_up_to("train.warmup_steps", 0, MOST_STEPS);
    let checkpoint_every = reader.integer_up_to("train.checkpoint_every", 0, MOST_STEPS).unwrap_or(200);
    TrainConfig {
        output: reader.required("train.output", "output = \"runs/first\"", paths::place).unwrap_or_default(),
        duration: match max_steps {
            Some(steps) => Duration::Steps(steps),
            None => Duration::Epochs(epochs.map_or(1, |epochs| epochs as u32)),
        },
        global_batch: reader
            .integer_up_to("train.global_batch", 1, MOST_SAMPLES)
            .map_or(64, |samples| samples as usize),
        micro_batch_tokens: reader.auto_integer("train.micro_batch_tokens"),
        learning_rate: reader.float("train.learning_rate", "a number greater than 0", above_zero).unwrap_or(4e-4),
        schedule: reader.choice("train.schedule").unwrap_or(Schedule::Cosine),
        warmup: match warmup_steps {
            Some(steps) => Warmup::Steps(steps),
            None => Warmup::Ratio(warmup_ratio.unwrap_or(0.001)),
        },
        weight_decay: reader.float("train.weight_decay", "a number of at least 0", from_zero).unwrap_or(0.0),
        betas: reader.betas().unwrap_or([0.9, 0.999]),
        eps: reader.float("train.eps", "a number greater than 0", above_zero).unwrap_or(1e-8),
        max_grad_norm: reader.float("train.max_grad_norm", "a number of at least 0", from_zero).unwrap_or(1.0),
        loss_average: reader.choice("train.loss_average").unwrap_or(LossAverage::Tokens),
        loss_group_samples: reader
            .integer_up_to("train.loss_group_samples", 1, MOST_SAMPLES)
            .map_or(1, |samples| samples as usize),
        seed: reader.integer_up_to("train.seed", 0, i64::MAX as u64).unwrap_or(42),
        recompute: reader.auto_choice("train.recompute"),
        shard: reader.auto_bool("train.shard"),
        deterministic: reader.bool("train.deterministic").unwrap_or(false),
        non_finite: reader.choice("train.non_finite").unwrap_or(NonFinite::Stop),
        max_non_finite: reader.integer_up_to("train.max_non_finite", 1, MOST_STEPS).unwrap_or(10),
        checkpoint_every,
        keep_checkpoints: reader
            .integer_up_to("train.keep_checkpoints", 1, MOST_CHECKPOINTS)
            .map_or(3, |count| count as usize),
        keep_best: reader.integer_up_to("train.keep_best", 0, MOST_CHECKPOINTS).map_or(0, |count| count as usize),
        keep_steps: reader.integers("train.keep_steps", 1, MOST_STEPS).unwrap_or_default(),
        eval_every: reader.integer_up_to("train.eval_every", 0, MOST_STEPS).unwrap_or(checkpoint_every),
        log_every: reader.integer_up_to("train.log_every", 0, MOST_STEPS).unwrap_or(1),
        save_dtype: reader.choice("train.save_dtype").unwrap_or(SaveDtype::Fp32),
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
        let fault = Fault::new(reader.raw.place("train.micro_batch_tokens"), what);
        reader.fault("train.micro_batch_tokens", fault.hint("raise it, lower data.max_length, or write \"auto\""));
    }
    let train = &config.train;
    let is_evaluated = train.eval_every > 0 && train.checkpoint_every.is_multiple_of(train.eval_every);
    let has_validation = !config.data.validation.is_empty() || config.data.validation_fraction > 0.0;
    let counts = train.keep_best > 0 && reader.file_keys == FileKeys::Required;
    if counts && !(is_evaluated && train.checkpoint_every > 0 && has_validation) {
        let what = "the best checkpoints are those of the lowest evaluation loss, and they are not evaluated";
        let fault = Fault::new(reader.raw.place("train.keep_best"), what);
        let hint = "give data.validation or data.validation_fraction, and a checkpoint_every that is a multiple of \
                    eval_every; or leave keep_best out";
        reader.fault("train.keep_best", fault.hint(hint));
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
        let fault = Fault::new(reader.raw.place("model.resize_vocab"), what);
        let hint = "write modules_to_save = [\"embed_tokens\", \"lm_head\"] under [lora], or resize_vocab = false";
        reader.fault("model.resize_vocab", fault.hint(hint));
    }
}
