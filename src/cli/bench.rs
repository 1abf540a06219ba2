//! `bellora bench`.

use std::path::PathBuf;

use clap::Args;

use crate::bench::Bench;
use crate::bench::dtypes::{self, DtypeSpeed};
use crate::bench::pieces;
use crate::cli::{print, say, signals};
use crate::config::{Auto, Config};
use crate::data::Lengths;
use crate::error::{Error, Result};
use crate::log::show_progress;
use crate::model::shapes;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// A config file: its base and its data are measured, or what --shape and --lengths put in their place
    config: Option<PathBuf>,
    /// Override a key: section.key=value, the value in TOML or as plain text [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// A model with random weights: a name (tiny, llama-2-7b, ...) or the path of a config.json
    #[arg(long, value_name = "NAME|FILE")]
    shape: Option<String>,
    /// Rows of the shape's tables, in place of its own number
    #[arg(long, value_name = "N", requires = "shape")]
    vocab_size: Option<i64>,
    /// Lengths of the samples: a file of lengths, or one length for all [default with --shape: those of BELLE's]
    #[arg(long, value_name = "FILE|N")]
    lengths: Option<String>,
    /// Updates to time
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    updates: u64,
    /// Updates before those
    #[arg(long, value_name = "K", default_value_t = 2, value_parser = clap::value_parser!(u64).range(..=100_000))]
    warmup: u64,
    /// Tokens a micro-batch may hold [default: train.micro_batch_tokens]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 31))]
    micro_batch_tokens: Option<u64>,
    /// Trace two further updates: write the name and time of every kernel (on a CPU: op) to FILE, and show the longest
    #[arg(long, value_name = "FILE", conflicts_with = "dtypes")]
    trace: Option<PathBuf>,
    /// Time the products of each dtype for a tenth of a second, print the fastest dtype first, and do nothing else
    #[arg(long, conflicts_with_all = ["config", "shape", "lengths", "updates", "warmup", "micro_batch_tokens"])]
    dtypes: bool,
    /// Time the pieces of one block's step, each by itself, over an update of train.global_batch samples, and do nothing else
    #[arg(long, requires = "shape", conflicts_with_all = ["config", "dtypes", "trace", "updates", "warmup", "micro_batch_tokens"])]
    pieces: bool,
    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &BenchArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    if args.dtypes {
        return compare_dtypes(args);
    }
    let shape = match &args.shape {
        Some(name) => Some((name.clone(), shapes::open(name, args.vocab_size, &[])?)),
        None => None,
    };
    let lengths = args.lengths.as_deref().map(Lengths::of_argument).transpose()?;
    if let (true, Some((name, shape))) = (args.pieces, &shape) {
        let config = Config::load_without_files(None, &args.sets)?;
        let report = pieces::measure(config, name, shape, lengths, &|doing| say(&format!("{doing}\n")))?;
        return if args.json { print(&(report.to_json() + "\n")) } else { print(&report.to_table()) };
    }
    let mut config = match (&args.config, &shape) {
        (config, Some(_)) => Config::load_without_files(config.as_deref(), &args.sets)?,
        (Some(config), None) => Config::load_to_read(config, &args.sets)?,
        (None, None) => {
            return Err(Error::invalid("bellora bench", "neither a config nor a shape is given")
                .hint(format!("name a config file, or --shape with one of {}", shapes::NAMES.join(", "))));
        }
    };
    if let Some(tokens) = args.micro_batch_tokens {
        config.train.micro_batch_tokens = Auto::Is(tokens as usize);
    }
    let bench = Bench { config, shape, lengths, updates: args.updates, warmup: args.warmup, trace: args.trace.clone() };
    let report = bench.run(&|doing| say(&format!("{doing}\n")))?;
    if args.json { print(&(report.to_json() + "\n")) } else { print(&report.to_table()) }
}

fn compare_dtypes(args: &BenchArgs) -> Result<()> {
    let speeds = dtypes::by_speed(Config::load_without_files(None, &args.sets)?)?;
    if args.json {
        return print(&(serde_json::to_string(&speeds).expect("names and numbers make JSON") + "\n"));
    }
    for DtypeSpeed { dtype, tflops } in speeds {
        print(&format!("{dtype}  {tflops:.3} TFLOP/s\n"))?;
    }
    Ok(())
}
