//! `bellora eval`.

use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

use clap::Args;

use crate::cli::generate::less_memory;
use crate::cli::{DtypeArgs, expect_room, print, say, signals};
use crate::comm::Solo;
use crate::config::{self, Auto, Config, Dtype};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::eval::{EvalResult, evaluate};
use crate::formats::safetensors_in::TensorFiles;
use crate::log::show_progress;
use crate::plan::parts::sum;
use crate::run::folder::{CONFIG_FILE, holds_run};
use crate::run::setup::{CacheUse, Job, ModelSetup};
use crate::torch::memory;
use crate::trained::{Trained, stored_dtype};

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// A config file (the model as training would start) or a run directory (the trained one)
    target: PathBuf,
    /// Override a key: section.key=value, such as data.validation=FILE [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    #[command(flatten)]
    dtype: DtypeArgs,
}

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let is_run = holds_run(&args.target);
    if args.target.is_dir() && !is_run {
        let what = format!("is a folder that holds no run: there is no {CONFIG_FILE}");
        return Err(Error::invalid(args.target.display().to_string(), what).hint(
            "name a config file or a run directory; an adapter is evaluated by a config with \
             --set model.init_adapter=DIR",
        ));
    }
    let mut config = match is_run {
        true => Config::load_run_to_evaluate(&args.target, &args.sets)?,
        false => Config::load_to_read(&args.target, &args.sets)?,
    };
    if let Some(dtype) = args.dtype.dtype.or_else(|| dtype_of_base(&config)) {
        config.model.dtype = Auto::Is(dtype);
    }
    let (model, samples) = validation(config)?;
    for warning in model.warnings.iter().chain(samples.warnings()) {
        say(&format!("warning: {}\n", warning.in_one_line()));
    }
    let tokens = micro_batch_tokens(&model, &samples)?;
    let needed = sum(&model.memory_model().evaluation(tokens as i64));
    expect_room("bellora eval", needed, model.device(), less_memory(model.kind()))?;
    // Signals end the program: nothing would be lost.
    let stop = AtomicUsize::new(0);
    say(&format!("evaluating on {} samples\n", samples.len()));
    let result = if is_run {
        let trained =
            Trained::open(&args.target, Some(&model.config.model.base), &model.config.model.allow_config_keys)?;
        let params = trained.params(model.kind(), model.device())?;
        let llama = trained.load(&params, model.kind(), model.config.data.max_length as i64)?;
        evaluate(&llama, &samples, tokens, &mut Solo, &stop)?
    } else {
        let mut params = model.initial_params()?;
        params.keep_for_reading()?;
        evaluate(&model.load(&params)?, &samples, tokens, &mut Solo, &stop)?
    };
    print_result(result)
}

/// The half-precision dtype that a base is stored in, where a config leaves the dtype to a CPU: its training would take fp32.
fn dtype_of_base(config: &Config) -> Option<Dtype> {
    let is_left = config.model.dtype == Auto::Auto && config.model.device != Auto::Is(config::Device::Cuda);
    if !is_left || Trained::device().is_cuda() {
        return None;
    }
    // A base with faults is told of where the model is set up.
    stored_dtype(&TensorFiles::open_model(&config.model.base).ok()?)
}

/// Tokens that a micro-batch may hold: what training takes, or less where memory is short.
fn micro_batch_tokens(model: &ModelSetup, samples: &Dataset) -> Result<usize> {
    let free = i64::try_from(memory::free_bytes(model.device())?).unwrap_or(i64::MAX);
    let needed = |tokens: usize| sum(&model.memory_model().evaluation(tokens as i64));
    let stats = samples.stats();
    let mut tokens = model.micro_batch_tokens().min(usize::try_from(stats.tokens).unwrap_or(usize::MAX));
    while tokens / 2 >= stats.max_len && needed(tokens) > free {
        tokens /= 2;
    }
    Ok(tokens)
}

/// The validation samples of a config: its files, or the share held out of the training samples.
fn validation(config: Config) -> Result<(ModelSetup, Dataset)> {
    if config.data.validation.is_empty() && config.data.validation_fraction > 0.0 {
        let job = Job::inspect(config, CacheUse::Read, 1)?;
        let held_out = job.validation.ok_or_else(|| Error::failed("validation", "no samples were held out"))?;
        return Ok((job.model, held_out));
    }
    if config.data.validation.is_empty() {
        return Err(Error::invalid("data.validation", "there is nothing to evaluate on")
            .hint("name files: --set data.validation=FILE"));
    }
    let model = ModelSetup::inspect(config, 1)?;
    let samples = model.validation_files()?;
    Ok((model, samples))
}

fn print_result(result: EvalResult) -> Result<()> {
    print(&(serde_json::to_string(&result).expect("numbers make JSON") + "\n"))
}
