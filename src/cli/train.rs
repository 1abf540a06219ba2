//! `bellora train` and `bellora resume`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{ConfigArgs, say, signals};
use crate::error::{Error, Result};
use crate::train::run::{self, Outcome};

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
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let config = args.config.load()?;
    let stop = signals::listen()?;
    tell(run::train(config, args.resume, &stop)?);
    Ok(())
}

pub(super) fn resume(args: &ResumeArgs) -> Result<()> {
    let stop = signals::listen()?;
    let run_dir = std::path::absolute(&args.run_dir).map_err(Error::io("resolve", &args.run_dir))?;
    tell(run::resume(&run_dir, &stop)?);
    Ok(())
}

fn tell(outcome: Outcome) {
    if outcome == Outcome::AlreadyFinished {
        say("the run is finished already: nothing to do\n");
    }
}
