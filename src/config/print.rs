//! A config as text: the run's own `config.toml`, and what `check --print-config` shows.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use toml::Value;

use super::resolve::GB;
use super::{Auto, Config, Duration, TemplateChoice, Warmup};

impl Config {
    /// Gives the whole config as TOML, defaults included; it loads back to an equal config.
    pub fn to_toml(&self) -> String {
        self.render(|_| "")
    }

    /// Gives the whole config as TOML, with `# default` behind the keys that the user did not give.
    pub fn print_with_defaults_marked(&self) -> String {
        self.render(|key| if self.given.contains(key) { "" } else { "  # default" })
    }

    fn render(&self, mark: impl Fn(&str) -> &'static str) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in self.entries() {
            let (of, name) = key.split_once('.').unwrap_or(("", key));
            if of != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}[{of}]\n"));
                section = of;
            }
            text.push_str(&format!("{name} = {value}{}\n", mark(key)));
        }
        text
    }

    /// Gives every key that holds with its value in TOML, section by section.
    pub(super) fn entries(&self) -> Vec<(&'static str, String)> {
        let Self { model, lora, data, train, warnings: _, unwritable: _, given: _ } = self;
        let init_adapter = model.init_adapter.iter().map(|dir| ("model.init_adapter", path(dir)));
        let mut entries = vec![
            ("model.base", path(&model.base)),
            ("model.tokenizer", path(&model.tokenizer)),
            ("model.dtype", auto(model.dtype, |dtype| quoted(dtype.as_str()))),
            ("model.device", auto(model.device, |device| quoted(device.as_str()))),
        ];
        entries.extend(init_adapter);
        entries.extend([
            ("model.resize_vocab", model.resize_vocab.to_string()),
            ("model.new_rows", quoted(model.new_rows.as_str())),
            ("model.allow_config_keys", list(model.allow_config_keys.iter().map(|name| quoted(name)))),
            ("lora.r", lora.r.to_string()),
            ("lora.alpha", float(lora.alpha)),
            ("lora.dropout", float(lora.dropout)),
            ("lora.target_modules", list(lora.target_modules.iter().map(|name| quoted(name)))),
            ("lora.modules_to_save", list(lora.modules_to_save.iter().map(|name| quoted(name)))),
            ("lora.use_rslora", lora.use_rslora.to_string()),
            ("data.train", paths(&data.train)),
            ("data.validation", paths(&data.validation)),
            ("data.validation_fraction", float(data.validation_fraction)),
            ("data.template", template(&data.template)),
            ("data.learn", auto(data.learn, |learn| quoted(learn.as_str()))),
            ("data.max_length", data.max_length.to_string()),
            ("data.truncation", quoted(data.truncation.as_str())),
            ("data.special_tokens", quoted(data.special_tokens.as_str())),
            ("data.shuffle", data.shuffle.to_string()),
            ("data.max_bad_rows", data.max_bad_rows.to_string()),
            ("data.cache_dir", path(&data.cache_dir)),
            ("data.cache_max_gb", (data.cache_max_bytes / GB).to_string()),
            ("train.output", path(&train.output)),
            match train.duration {
                Duration::Epochs(epochs) => ("train.epochs", epochs.to_string()),
                Duration::Steps(steps) => ("train.max_steps", steps.to_string()),
            },
            ("train.global_batch", train.global_batch.to_string()),
            ("train.micro_batch_tokens", auto(train.micro_batch_tokens, |tokens| tokens.to_string())),
            ("train.learning_rate", float(train.learning_rate)),
            ("train.schedule", quoted(train.schedule.as_str())),
            match train.warmup {
                Warmup::Ratio(ratio) => ("train.warmup_ratio", float(ratio)),
                Warmup::Steps(steps) => ("train.warmup_steps", steps.to_string()),
            },
            ("train.weight_decay", float(train.weight_decay)),
            ("train.betas", list(train.betas.map(float))),
            ("train.eps", float(train.eps)),
            ("train.max_grad_norm", float(train.max_grad_norm)),
            ("train.loss_average", quoted(train.loss_average.as_str())),
            ("train.loss_group_samples", train.loss_group_samples.to_string()),
            ("train.seed", train.seed.to_string()),
            ("train.recompute", auto(train.recompute, |which| quoted(which.as_str()))),
            ("train.shard", auto(train.shard, |shard| shard.to_string())),
            ("train.deterministic", train.deterministic.to_string()),
            ("train.non_finite", quoted(train.non_finite.as_str())),
            ("train.max_non_finite", train.max_non_finite.to_string()),
            ("train.checkpoint_every", train.checkpoint_every.to_string()),
            ("train.keep_checkpoints", train.keep_checkpoints.to_string()),
            ("train.keep_best", train.keep_best.to_string()),
            ("train.keep_steps", list(&train.keep_steps)),
            ("train.eval_every", train.eval_every.to_string()),
            ("train.log_every", train.log_every.to_string()),
            ("train.save_dtype", quoted(train.save_dtype.as_str())),
        ]);
        entries
    }
}

fn auto<T>(value: Auto<T>, show: impl Fn(T) -> String) -> String {
    match value {
        Auto::Auto => quoted("auto"),
        Auto::Is(value) => show(value),
    }
}

fn template(template: &TemplateChoice) -> String {
    match template {
        TemplateChoice::Alpaca => quoted("alpaca"),
        TemplateChoice::Chat => quoted("chat"),
        TemplateChoice::ChineseAlpaca => quoted("chinese-alpaca"),
        TemplateChoice::File(file) => path(file),
    }
}

/// Writes a float with all its digits, and so that it is read back as one.
fn float(number: f64) -> String {
    format!("{number:?}")
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The paths of a config were found to be UTF-8 when it was resolved.
fn path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn paths(files: &[PathBuf]) -> String {
    list(files.iter().map(|file| path(file)))
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(", "))
}
