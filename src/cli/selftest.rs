//! `bellora selftest`.

use clap::{Args, ValueEnum};

use crate::cli::{print, say, signals};
use crate::device::{self, Cuda};
use crate::error::{Error, Result};
use crate::selftest::{self, Row, Scope, SelftestReport, Target, TestedMachine};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

#[derive(Debug, Args)]
pub(super) struct SelftestArgs {
    /// Where to compute [default: cuda where there is a usable GPU, else cpu]
    #[arg(long, value_enum)]
    device: Option<Where>,
    /// Try the ops alone: no training, no ranks (for tools as compute-sanitizer, which slow every kernel down)
    #[arg(long)]
    kernels: bool,
    /// Print JSON instead of a table, and on standard error each row as soon as it is known
    #[arg(long)]
    json: bool,
}

/// Columns of a result's name where the longest is not known yet.
const ROW_WIDTH: usize = 32;

pub(super) fn run(args: &SelftestArgs) -> Result<()> {
    signals::end_at_once()?;
    let target = target(args.device)?;
    let scope = if args.kernels { Scope::Kernels } else { Scope::Whole };
    let report = selftest::run(target, scope, &|row| {
        if args.json {
            say(&table_line(row, ROW_WIDTH));
        }
    })?;
    if args.json {
        print(&(serde_json::to_string_pretty(&report).expect("numbers and strings make JSON") + "\n"))?;
    } else {
        print(&text(&report))?;
    }
    if report.ok {
        return Ok(());
    }
    let what = format!("{} of {} results are not in order", report.failed().count(), report.rows.len());
    let hint = match report.failed().all(|row| row.fault.is_empty()) {
        true => "do not train on this device in the dtypes concerned; report the table with the device's name",
        false => "report the table with the device's name",
    };
    Err(Error::failed("selftest", what).hint(hint))
}

/// Settles where to compute.
fn target(asked: Option<Where>) -> Result<Target<'static>> {
    if asked == Some(Where::Cpu) {
        return Ok(Target::Cpu);
    }
    match (device::cuda(), asked) {
        (Cuda::Usable(gpu), _) => Ok(Target::Cuda(gpu)),
        (Cuda::Missing { what, hint }, Some(_)) => {
            Err(Error::invalid("--device cuda", what.as_str()).hint(hint.as_str()))
        }
        (Cuda::Missing { what, .. }, None) => {
            say(&format!("no GPU: {what}; testing the CPU\n"));
            Ok(Target::Cpu)
        }
    }
}

/// The report as a table.
fn text(report: &SelftestReport) -> String {
    let mut text = machine_lines(&report.machine);
    let width = report.rows.iter().map(|row| row.op.chars().count()).max().unwrap_or_default();
    text.push_str(&format!("\n{:width$}  dtype  largest error  tolerance\n", "result"));
    for row in &report.rows {
        text.push_str(&table_line(row, width));
    }
    let n_ok = report.rows.iter().filter(|row| row.ok).count();
    text.push_str(&format!("\n{n_ok} of {} results are in order\n", report.rows.len()));
    text
}

fn table_line(row: &Row, width: usize) -> String {
    let pad = width.saturating_sub(row.op.chars().count());
    let verdict = if row.ok { "ok" } else { "NOT IN ORDER" };
    let number = |x: f64| if x == 0.0 { "0".to_string() } else { format!("{x:.1e}") };
    let measured = match row.fault.as_str() {
        "" => format!("{:>13}  {:>9}", number(row.error), number(row.tolerance)),
        fault => format!("no result: {fault}"),
    };
    format!("{}{:pad$}  {:<5}  {measured}  {verdict}\n", row.op, "", row.dtype)
}

fn machine_lines(machine: &TestedMachine) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
    let device = match &machine.gpu {
        None => format!("the CPU, {} threads, {:.1} GiB free", tch::get_num_threads(), gib(machine.free_bytes)),
        Some(gpu) => {
            let free = gib(machine.free_bytes);
            format!("{}, {} multiprocessors, {free:.1} GiB free", gpu.text, gpu.n_multiprocessors)
        }
    };
    format!("device  {device}\ndtypes  {}\n", machine.dtypes.join(", "))
}
