//! `bellora replay`.

use std::path::PathBuf;

use clap::Args;

use crate::checkpoint::state::ComputedOn;
use crate::cli::{print, say, signals};
use crate::engine::non_finite::json_line;
use crate::error::Result;
use crate::log::show_progress;
use crate::run::replay::{Recorded, Replay};

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// The run directory
    run_dir: PathBuf,
    /// The update, counted from 1 as in metrics.jsonl
    #[arg(long, value_name = "N")]
    step: u64,
    /// Override a key of the run's config: section.key=value, such as model.base=DIR where it has moved [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub(super) fn run(args: &ReplayArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let mut replay = Replay::open(&args.run_dir, args.step, &args.sets)?;
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
    say(&verdict(args.step, &replayed.recorded, &replay.computed_on));
    Ok(())
}

/// Whether the update came out as the run has it, and if not, what may be why.
fn verdict(step: u64, recorded: &Recorded, computed_on: &(ComputedOn, Option<ComputedOn>)) -> String {
    let others = match recorded {
        Recorded::Nothing => return format!("metrics.jsonl has no line of step {step} to compare with\n"),
        Recorded::Same => return format!("step {step} is the same as in metrics.jsonl, bit for bit\n"),
        Recorded::Others(others) => others,
    };
    let others: Vec<String> =
        others.iter().map(|(key, here, there)| format!("{key} {here} here, {there} there")).collect();
    let why = match computed_on {
        (here, Some(there)) if here != there => format!(
            "it computes on {here} here, and the run on {there}; OMP_NUM_THREADS sets the threads"
        ),
        _ => "sums are rounded otherwise on another machine or libtorch, and where the run had other micro-batches then; \
              train.log says where they changed"
            .to_owned(),
    };
    format!("step {step} is not the same as in metrics.jsonl: {}\n  hint: {why}\n", others.join("; "))
}
