//! `bellora eval`.

use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

use clap::Args;

use crate::cli::{print, say, signals};
use crate::comm::Solo;
use crate::config::Config;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::eval::{EvalResult, evaluate};
use crate::log::show_progress;
use crate::train::run_dir::{CONFIG_FILE, holds_run};
use crate::train::setup::{CacheUse, Job, ModelSetup};
use crate::trained::Trained;

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// A config file (the model as training would start) or a run directory (the trained one)
    target: PathBuf,
    /// Override a key: section.key=value, such as data.validation=FILE [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
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
    let config = match is_run {
        true => Config::load_run_to_evaluate(&args.target, &args.sets)?,
        false => Config::load_to_read(&args.target, &args.sets)?,
    };
    let (model, samples) = validation(config)?;
    for warning in model.warnings.iter().chain(samples.warnings()) {
        say(&format!("warning: {}\n", warning.in_one_line()));
    }
    // Signals end the program: nothing would be lost.
    let stop = AtomicUsize::new(0);
    say(&format!("evaluating on {} samples\n", samples.len()));
    let result = if is_run {
        let trained =
            Trained::open(&args.target, Some(&model.config.model.base), &model.config.model.allow_config_keys)?;
        let params = trained.params(model.kind(), model.device())?;
        let llama = trained.load(&params, model.kind(), model.config.data.max_length as i64)?;
        evaluate(&llama, &samples, model.micro_batch_tokens(), &mut Solo, &stop)?
    } else {
        let params = model.initial_params()?;
        evaluate(&model.load(&params)?, &samples, model.micro_batch_tokens(), &mut Solo, &stop)?
    };
    print_result(result)
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
