//! `bellora export`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tch::Device;

use crate::cli::{ModelArgs, expect_room, say, signals};
use crate::error::Result;
use crate::export::{expect_possible, export_merged, export_peft, merged_bytes};
use crate::log::show_progress;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// The adapter as PEFT reads it
    Peft,
    /// A model directory with the adapter merged into the base
    Merged,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A run directory or an adapter's folder
    source: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    format: Format,
    /// The folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let stop = signals::listen()?;
    show_progress();
    let trained = args.model.open(&args.source)?;
    expect_possible(&trained, &args.out)?;
    match args.format {
        Format::Peft => export_peft(&trained, &args.out, &stop)?,
        Format::Merged => {
            expect_room(
                "bellora export",
                merged_bytes(&trained),
                Device::Cpu,
                "use a machine with more memory, or --format peft",
            )?;
            export_merged(&trained, &args.out, &stop)?;
        }
    }
    say(&format!("written to {}\n", args.out.display()));
    Ok(())
}
