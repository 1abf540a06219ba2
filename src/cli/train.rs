//! `bellora train` and `bellora resume`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;

use crate::cli::ranks::{self, RankArgs, Role};
use crate::cli::supervisor::{FOLLOWS_ANOTHER, supervise};
use crate::cli::{ConfigArgs, print, say, signals};
use crate::comm::Communicator;
use crate::config::{self, Auto, Config};
use crate::device::{self, Cuda};
use crate::disk::LocalDisk;
use crate::error::{Error, Result};
use crate::log::show_progress;
use crate::progress;
use crate::run::begin;
use crate::run::folder::expect_run;
use crate::run::start::Host;
use crate::run::training_loop::RunOutcome;

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Go on with the run in train.output from its newest good checkpoint, or start it
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    ranks: RankArgs,
}

#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    /// The run directory
    run_dir: PathBuf,
    /// Override a key of the run's config: section.key=value, such as train.epochs=3 [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    #[command(flatten)]
    ranks: RankArgs,
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    args.ranks.introduce();
    let config = args.ranks.said_once(args.config.load())?;
    match args.ranks.role(on_gpus(&config))? {
        Role::Supervisor(nproc) => supervise(&args.ranks, nproc, !args.resume),
        Role::Rank(ranks) => end(ranks.rank(), begin::train(config, args.resume, &host(&*ranks)?, ranks)),
    }
}

pub(super) fn resume(args: &ResumeArgs) -> Result<()> {
    args.ranks.introduce();
    let run_dir = std::path::absolute(&args.run_dir).map_err(Error::io("resolve", &args.run_dir))?;
    args.ranks.said_once(expect_run(&run_dir))?;
    let config = args.ranks.said_once(Config::load_run(&run_dir, &args.sets))?;
    match args.ranks.role(on_gpus(&config))? {
        Role::Supervisor(nproc) => supervise(&args.ranks, nproc, false),
        Role::Rank(ranks) => end(ranks.rank(), begin::resume(&run_dir, &args.sets, &host(&*ranks)?, ranks)),
    }
}

/// Whether a config's model will be on a GPU.
fn on_gpus(config: &Config) -> bool {
    config.model.device != Auto::Is(config::Device::Cpu) && matches!(device::cuda(), Cuda::Usable(_))
}

fn host(ranks: &dyn Communicator) -> Result<Host> {
    let is_watched = ranks.world_size() > 1 && ranks::is_supervised();
    let tell = is_watched.then_some(tell as fn(&str));
    if is_watched {
        progress::listen(tell_of_work);
    }
    if ranks.rank() == 0 {
        show_progress();
    }
    let n_local_ranks = ranks::on_this_machine(ranks.world_size());
    Ok(Host { disk: LocalDisk::shared(), requests: signals::listen_for_run()?, tell, n_local_ranks })
}

/// Tells the supervisor, by a line on standard output, how far this rank is.
fn tell(status: &str) {
    // Without a supervisor the rank ends anyway.
    let _ = print(&format!("{status}\n"));
}

/// Tells the supervisor, not more than once a second, that work gets on which is no step: tokenising, loading, evaluating.
fn tell_of_work(work: &progress::State) {
    static TOLD: Mutex<Option<Instant>> = Mutex::new(None);
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.is_none_or(|told| told.elapsed() >= Duration::from_secs(1)) {
        *told = Some(Instant::now());
        tell(&work.line());
    }
}

fn end(rank: usize, outcome: Result<RunOutcome>) -> Result<()> {
    match outcome {
        Ok(RunOutcome::AlreadyFinished) => say("the run is finished already: nothing to do\n"),
        Ok(RunOutcome::Trained) => {}
        // All have stopped after the same step, and rank 0 has saved it.
        Err(error @ Error::Interrupted { .. }) if rank != 0 => {
            return Err(Error::SaidByAnother { exit_code: error.exit_code() });
        }
        Err(error) => {
            if ranks::is_supervised() && matches!(error, Error::Lost(_)) {
                tell(FOLLOWS_ANOTHER);
            }
            return Err(error);
        }
    }
    Ok(())
}
