//! `bellora verify`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{print, signals};
use crate::error::{Error, Result};
use crate::run::verify::{Verdict, VerifiedPart, inspect};

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// A run directory, an adapter's folder, or what `export` wrote
    path: PathBuf,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &VerifyArgs) -> Result<()> {
    signals::end_at_once()?;
    let report = inspect(&args.path)?;
    if args.json {
        print(&(serde_json::to_string_pretty(&report).expect("strings make JSON") + "\n"))?;
    } else {
        print(&report.parts.iter().map(line).collect::<String>())?;
    }
    if report.whole {
        return Ok(());
    }
    let n_damaged = report.parts.iter().filter(|part| part.verdict == Verdict::Damaged).count();
    let what = format!("{n_damaged} of {} parts are damaged", report.parts.len());
    Err(Error::failed(args.path.display().to_string(), what).hint(
        "copy what is damaged again from where it is whole; `bellora resume` passes over a damaged checkpoint and goes on \
         from the one before it",
    ))
}

fn line(part: &VerifiedPart) -> String {
    let details = if part.details.is_empty() { String::new() } else { format!(": {}", part.details.join("; ")) };
    format!("{}: {}{details}\n", part.name, part.verdict.as_str())
}
