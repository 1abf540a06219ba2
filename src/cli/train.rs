//! `bellora train` and `bellora resume`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{ConfigArgs, say, signals};
use crate::disk::LocalDisk;
use crate::error::{Error, Result};
use crate::train::begin::{self, Host};
use crate::train::run::Outcome;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Go on with the run in train.output from its newest good checkpoint, or start it
    #[arg(long)]
    resume: bool,
}

#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    /// The run directory
    run_dir: PathBuf,
    /// Override a key of the run's config: section.key=value, such as train.epochs=3 [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let config = args.config.load()?;
    tell(begin::train(config, args.resume, &host()?)?);
    Ok(())
}

pub(super) fn resume(args: &ResumeArgs) -> Result<()> {
    let run_dir = std::path::absolute(&args.run_dir).map_err(Error::io("resolve", &args.run_dir))?;
    tell(begin::resume(&run_dir, &args.sets, &host()?)?);
    Ok(())
}

fn host() -> Result<Host> {
    Ok(Host { disk: LocalDisk::shared(), requests: signals::listen_for_run()? })
}

fn tell(outcome: Outcome) {
    if outcome == Outcome::AlreadyFinished {
        say("the run is finished already: nothing to do\n");
    }
}
