//! `bellora replay`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{print, say, signals};
use crate::error::Result;
use crate::train::non_finite::json_line;
use crate::train::replay::{Recorded, Replay};

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// The run directory
    run_dir: PathBuf,
    /// The update, counted from 1 as in metrics.jsonl
    #[arg(long, value_name = "N")]
    step: u64,
}

pub(super) fn run(args: &ReplayArgs) -> Result<()> {
    signals::end_at_once()?;
    let mut replay = Replay::open(&args.run_dir, args.step)?;
    for (path, error) in &replay.damaged {
        say(&format!("warning: {} is damaged and was passed over: {error}\n", path.display()));
    }
    match &replay.from {
        Some(checkpoint) => say(&format!("from {}\n", checkpoint.display())),
        None => say("from the start of the run: there is no checkpoint before that step\n"),
    }
    replay.catch_up(|metrics| say(&format!("step {} is done again\n", metrics.step)))?;
    let replayed = replay.replay()?;
    print(&replayed.samples.iter().map(json_line).collect::<String>())?;
    print(&json_line(&replayed.line))?;
    say(&verdict(args.step, &replayed.recorded));
    Ok(())
}

/// Whether the update came out as the run has it.
fn verdict(step: u64, recorded: &Recorded) -> String {
    match recorded {
        Recorded::Nothing => format!("metrics.jsonl has no line of step {step} to compare with\n"),
        Recorded::Same => format!("step {step} is the same as in metrics.jsonl, bit for bit\n"),
        Recorded::Others(others) => {
            let others: Vec<String> =
                others.iter().map(|(key, here, there)| format!("{key} {here} here, {there} there")).collect();
            format!(
                "step {step} is not the same as in metrics.jsonl: {}\n  hint: sums are rounded otherwise on another machine, \
                 with another number of threads (OMP_NUM_THREADS) or libtorch, and where the run had other micro-batches \
                 then; train.log says where they changed\n",
                others.join("; ")
            )
        }
    }
}
