//! `bellora check`.

use clap::Args;

use crate::cli::{ConfigArgs, print, signals};
use crate::disk::LocalDisk;
use crate::error::Result;
use crate::log::show_progress;
use crate::run::setup::{CacheUse, Job};
use crate::run::{banner, folder, training_loop};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the resolved config, defaults marked, and stop
    #[arg(long)]
    print_config: bool,
}

pub(super) fn run(args: &CheckArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let config = args.config.load()?;
    if args.print_config {
        return print(&config.print_with_defaults_marked());
    }
    let job = Job::inspect(config, CacheUse::Judge, 1)?;
    job.expect_room(1)?;
    folder::refuse_taken_output(&job.model.config)?;
    job.run_bytes().fit(&LocalDisk, &job.model.config.train.output, 0)?;
    for line in banner::lines(&job)? {
        print(&format!("{line}\n"))?;
    }
    for warning in training_loop::warnings(&job) {
        print(&format!("warning: {warning}\n"))?;
    }
    print("ready to train\n")
}
