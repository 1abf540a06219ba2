//! The command line: a file a subcommand. Standard output is data; everything else goes to standard error.

mod bench;
mod check;
mod claim;
mod defects;
mod eval;
mod export;
mod generate;
mod plan;
mod prepare;
mod ranks;
mod replay;
mod selftest;
mod signals;
mod supervisor;
mod train;
mod verify;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tch::Device;

use crate::config::{Config, Dtype};
use crate::error::{Error, Result};
use crate::log::say;
use crate::plan::{expect_to_fit, gib};
use crate::torch::memory;
use crate::trained::Trained;

/// LoRA fine-tuning of Llama-family language models
#[derive(Debug, Parser)]
#[command(name = "bellora", version, max_term_width = 120, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say everything that can be known before training
    ///
    /// Reads the config, the headers of the weights, the tokenizer and all samples; creates no file.
    ///
    /// Example: bellora check configs/quickstart.toml
    Check(check::CheckArgs),
    /// Say what a run needs: memory, micro-batches, time, disk
    ///
    /// For this machine, or for a GPU that is not here. With --shape neither the model's files nor samples are needed. Times
    /// are estimates.
    ///
    /// Example: bellora plan run.toml --gpu A100-80
    Plan(plan::PlanArgs),
    /// Turn the samples into tokens and keep them in the cache
    ///
    /// Example: bellora prepare run.toml --dump tokens.jsonl
    Prepare(prepare::PrepareArgs),
    /// Train adapters
    ///
    /// Example: bellora train run.toml --set train.learning_rate=2e-4
    Train(train::TrainArgs),
    /// Go on with a run from its newest good checkpoint
    ///
    /// Example: bellora resume runs/mine
    Resume(train::ResumeArgs),
    /// Do an update of a run again and say the loss of each of its samples
    ///
    /// From the nearest checkpoint before it. Prints one JSON line a sample {step, place, slot, tokens, label_tokens, loss}:
    /// the mean over its label tokens, alone, under the dropout of that step, before the update; then the update's line of
    /// metrics.jsonl without the times. On the same machine with as many threads it is the same bit for bit. Nothing in the
    /// folder is changed, and the run may go on meanwhile.
    ///
    /// Example: bellora replay runs/mine --step 1200
    Replay(replay::ReplayArgs),
    /// Say whether all that a run has written is whole
    ///
    /// Config, metrics, every checkpoint and adapter, each held against its checksums or rules; a line each, whole, damaged
    /// with what is wrong, or harmless (left by something that was interrupted). Also for an adapter's folder and for what
    /// export wrote. Exit code 0 if all is whole, 1 if something is damaged, 2 if there is nothing of the kind.
    ///
    /// Example: bellora verify runs/mine
    Verify(verify::VerifyArgs),
    /// Compute the loss on the validation samples
    ///
    /// Prints one JSON line {eval_loss, perplexity, samples, label_tokens}: of the model as training would start for a
    /// config, of the trained model for a run directory.
    ///
    /// Example: bellora eval runs/mine
    Eval(eval::EvalArgs),
    /// Write a trained adapter for use elsewhere
    ///
    /// Example: bellora export runs/mine --format merged --out merged
    Export(export::ExportArgs),
    /// Measure how fast this machine trains
    ///
    /// Tokens a second, the share of the fastest product of this machine, time by part and memory. A shape needs no files:
    /// its weights are random, and so are the samples, of the lengths of real ones.
    ///
    /// Example: bellora bench --shape llama-2-7b --set model.dtype=bf16
    Bench(bench::BenchArgs),
    /// Answer a prompt
    ///
    /// Example: bellora generate runs/mine --prompt "你是谁？"
    Generate(generate::GenerateArgs),
    /// Check what this machine computes
    ///
    /// Tries every operation of a training step in every dtype of the device, and a tiny training run, against the same in
    /// higher precision on the CPU. Needs no files. Exit code 1 if a result is not in order, 2 if the device is not there.
    ///
    /// Example: bellora selftest --device cuda
    Selftest(selftest::SelftestArgs),
}

impl Command {
    /// Whether the command runs the model.
    fn computes(&self) -> bool {
        !matches!(self, Self::Check(_) | Self::Plan(_) | Self::Prepare(_) | Self::Verify(_))
    }
}

/// Variables that libraries read once, as they are loaded, before any code of ours; those that the user has set stay.
const READ_AT_START: [(&str, &str); 5] = [
    // OpenMP's threads sleep, and do not spin, while they wait for each other. Spinning threads are ruinous as soon as
    // anything else wants the processors: the one that would end the wait is kept from running.
    ("OMP_WAIT_POLICY", "passive"),
    // cuBLAS gives equal results for equal products only with a work space of a fixed size; it is no larger than its own.
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    // How many products oneDNN and libtorch's layer above it remember. By default it is 1,024 each; where micro-batches differ in
    // size, both fill with products of sizes that hardly come again, at up to 1 MiB for both. A step has some forty.
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"),
    ("LRU_CACHE_CAPACITY", "64"),
    // libtorch's allocator of GPU memory grows its segments in place, so that micro-batches of other sizes leave no holes.
    (GPU_ALLOCATOR, "expandable_segments:True"),
];

/// What sets libtorch's allocator of GPU memory, and the newer name of the same.
const GPU_ALLOCATOR: &str = "PYTORCH_CUDA_ALLOC_CONF";
const GPU_ALLOCATOR_TOO: &str = "PYTORCH_ALLOC_CONF";

/// Starts the program again with the variables that libraries read at their start.
fn set_what_libraries_read() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let is_settled = |name: &str| is_set(name) || name == GPU_ALLOCATOR && is_set(GPU_ALLOCATOR_TOO);
    let unset = READ_AT_START.into_iter().filter(|(name, _)| !is_settled(name));
    let mut missing: Vec<_> = unset.map(|(name, value)| (name, value.to_owned())).collect();
    missing.extend(ranks::own_gpu().map(|gpu| (ranks::VISIBLE_GPUS, gpu)));
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // On success this does not return; otherwise the program goes on as it is.
        let _ = std::process::Command::new(program).args(std::env::args_os().skip(1)).envs(missing).exec();
    }
}

/// A config file with overrides.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// The config file (TOML)
    config: PathBuf,
    /// Override a key: section.key=value, the value in TOML or as plain text [repeatable]
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl ConfigArgs {
    /// For a command that writes where the config says.
    fn load(&self) -> Result<Config> {
        Config::load(&self.config, &self.sets)
    }

    /// For a command that writes nothing there.
    fn load_to_read(&self) -> Result<Config> {
        Config::load_to_read(&self.config, &self.sets)
    }
}

/// Which base a trained model is on.
#[derive(Debug, Args)]
struct ModelArgs {
    /// The base model [default: the one the adapter names]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Pass over this key of the base's config.json, which is not known here [repeatable]
    #[arg(long = "allow-config-key", value_name = "KEY")]
    allow_config_keys: Vec<String>,
}

impl ModelArgs {
    /// Opens what a command is given, and says what may not be what the user means.
    fn open(&self, source: &Path) -> Result<Trained> {
        let trained = Trained::open(source, self.base.as_deref(), &self.allow_config_keys)?;
        for warning in &trained.warnings {
            say(&format!("warning: {}\n", warning.in_one_line()));
        }
        Ok(trained)
    }
}

#[derive(Debug, Args)]
struct DtypeArgs {
    /// Compute in fp32, bf16 or fp16 [default: the run's dtype, else the one the base is stored in]
    #[arg(long)]
    dtype: Option<Dtype>,
}

/// Refuses a command that takes more memory than there is, and says what one takes that needs a good part of a machine.
fn expect_room(place: &str, needed: i64, device: Device, hint: &str) -> Result<()> {
    let room = memory::room(device)?;
    expect_to_fit(place, needed, &room, hint)?;
    if needed >= SAID_FROM {
        let free = i64::try_from(room.bytes).unwrap_or(i64::MAX);
        say(&format!("memory      about {} at the peak; {} are {}\n", gib(needed), gib(free), room.bound));
    }
    Ok(())
}

/// A command that needs as much memory says so, in bytes.
const SAID_FROM: i64 = 1 << 30;

/// Runs the program and gives its exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.command.computes() {
        set_what_libraries_read();
        crate::torch::keep_freed_memory();
    }
    signals::in_a_thread_of_their_own();
    if cli.command.computes() || matches!(cli.command, Command::Check(_) | Command::Plan(_)) {
        // Opens CUDA where it is, before libtorch is used.
        let _ = crate::device::cuda();
    }
    // No taped autograd anywhere in the product.
    let _no_grad = tch::no_grad_guard();
    let result = defects::caught(|| match cli.command {
        Command::Check(args) => check::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Prepare(args) => prepare::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Resume(args) => train::resume(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Selftest(args) => selftest::run(&args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, Error::SaidByAnother { .. }) {
                report(&error);
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints an error: each fault with its place and, where there is one, its hint.
fn report(error: &Error) {
    let mut text = String::new();
    let mut add = |what: &dyn std::fmt::Display, hint: &str| {
        text.push_str(&format!("error: {what}\n"));
        if !hint.is_empty() {
            text.push_str(&format!("  hint: {hint}\n"));
        }
    };
    if error.faults().is_empty() {
        add(error, error.advice());
    }
    for fault in error.faults() {
        add(fault, &fault.hint);
    }
    say(&text);
}

/// Writes data to standard output.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| {
        let what = match e.kind() {
            std::io::ErrorKind::BrokenPipe => "was closed by its reader".to_string(),
            _ => format!("cannot be written: {e}"),
        };
        Error::failed("standard output", what)
    })
}
