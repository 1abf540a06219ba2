//! A trace: every kernel of some updates (on a CPU: every op of libtorch's) with its time, for a file; and which of them take
//! longest, for the report.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use tch::Device;

use crate::disk::{LocalDisk, put_file};
use crate::engine::step::Trainer;
use crate::error::{Error, Result};
use crate::torch::memory::synchronize;
use crate::torch::trace::{Event, Recording};

/// Updates that are traced.
const UPDATES: u64 = 2;
/// Kernels that the table of the report shows.
pub(super) const SHOWN: usize = 15;

/// What was traced.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trace {
    /// The file with every event.
    pub file: PathBuf,
    /// Updates in it.
    pub updates: u64,
    /// Events in it.
    pub n_events: usize,
    /// How long those updates took, recorded as they were.
    pub secs: f64,
    /// What ran, the longest in all first.
    pub kernels: Vec<Kernel>,
}

/// All that ran under one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kernel {
    /// As libtorch or CUDA names it.
    pub name: String,
    /// How often it ran.
    pub calls: u64,
    /// Seconds in all, without what it called itself.
    pub secs: f64,
    /// These as a share of all kernels'.
    pub share: f64,
}

/// The file's content: compact, for a large model has a hundred thousand events.
#[derive(Serialize)]
struct TraceFile<'a> {
    about: &'static str,
    version: &'static str,
    device: &'static str,
    updates: u64,
    secs: f64,
    kernels: &'a [Kernel],
    names: Vec<&'a str>,
    events: Vec<(usize, u64, i64, i64)>,
}

const ABOUT: &str = "events: [index in names, stream or thread, start in ns, duration in ns with all that was called]; \
    kernels: seconds without what was called";

/// Traces two updates and writes them to a file.
///
/// # Errors
/// A profiler that cannot be used; whatever ends an update; a file that cannot be written.
pub(super) fn record(trainer: &mut Trainer, device: Device, file: &Path) -> Result<Trace> {
    trainer.finish()?;
    synchronize(device)?;
    let recording = Recording::begin(device)?;
    let started = Instant::now();
    for _ in 0..UPDATES {
        trainer.step()?;
    }
    trainer.finish()?;
    synchronize(device)?;
    let secs = started.elapsed().as_secs_f64();
    let events = recording.end()?;
    let trace = Trace { file: file.into(), updates: UPDATES, n_events: events.len(), secs, kernels: kernels(&events) };
    put_file(&LocalDisk, file, &content(&trace, &events, device))?;
    Ok(trace)
}

/// Refuses a file that could not be written, before anything is measured.
///
/// # Errors
/// A folder that is not there; a folder in the file's place.
pub(super) fn check_file(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let what = match () {
        () if !folder.is_dir() => format!("{} is no folder", folder.display()),
        () if file.is_dir() => format!("{} is a folder", file.display()),
        () => return Ok(()),
    };
    Err(Error::invalid("--trace", what).hint("name a file in a folder that is there"))
}

fn content(trace: &Trace, events: &[Event], device: Device) -> Vec<u8> {
    let mut indices = HashMap::new();
    let mut names = Vec::new();
    let mut index_of = |name| {
        *indices.entry(name).or_insert_with(|| {
            names.push(name);
            names.len() - 1
        })
    };
    let events = events.iter().map(|event| {
        let Event { name, lane, start_ns, duration_ns } = event;
        (index_of(name.as_str()), *lane, *start_ns, *duration_ns)
    });
    let events = events.collect();
    let file = TraceFile {
        about: ABOUT,
        version: env!("CARGO_PKG_VERSION"),
        device: if device.is_cuda() { "cuda" } else { "cpu" },
        updates: trace.updates,
        secs: trace.secs,
        kernels: &trace.kernels,
        names,
        events,
    };
    serde_json::to_vec(&file).expect("numbers and strings make JSON")
}

/// Adds the events up by name, the longest first.
fn kernels(events: &[Event]) -> Vec<Kernel> {
    let mut sums: BTreeMap<&str, (u64, i64)> = BTreeMap::new();
    for (event, own_ns) in events.iter().zip(own_times(events)) {
        let (calls, ns) = sums.entry(&event.name).or_default();
        (*calls, *ns) = (*calls + 1, *ns + own_ns);
    }
    let total = sums.values().map(|(_, ns)| *ns as f64).sum::<f64>().max(1.0);
    let kernel = |(name, (calls, ns)): (&str, (u64, i64))| {
        let ns = ns as f64;
        Kernel { name: name.to_string(), calls, secs: ns / 1e9, share: ns / total }
    };
    let mut kernels: Vec<Kernel> = sums.into_iter().map(kernel).collect();
    kernels.sort_by(|a, b| b.secs.total_cmp(&a.secs));
    kernels
}

/// Nanoseconds of each event without those of the events that it called: what lies within it on the same thread. A stream's
/// kernels come one after the other, and keep all of theirs.
fn own_times(events: &[Event]) -> Vec<i64> {
    let mut own: Vec<i64> = events.iter().map(|event| event.duration_ns).collect();
    let mut order: Vec<usize> = (0..events.len()).collect();
    order.sort_by_key(|&i| (events[i].lane, events[i].start_ns, -events[i].duration_ns));
    let end = |i: usize| events[i].start_ns + events[i].duration_ns;
    let mut open: Vec<usize> = Vec::new();
    for i in order {
        // An event that reaches beyond the one before it was not called by it.
        while open.last().is_some_and(|&outer| events[outer].lane != events[i].lane || end(outer) < end(i)) {
            open.pop();
        }
        if let Some(&outer) = open.last() {
            own[outer] -= events[i].duration_ns;
        }
        open.push(i);
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, lane: u64, start_ns: i64, duration_ns: i64) -> Event {
        Event { name: name.into(), lane, start_ns, duration_ns }
    }

    #[test]
    fn time_belongs_to_what_was_called() {
        let events = [
            event("matmul", 1, 0, 100),
            event("mm", 1, 10, 80),
            event("empty", 1, 15, 5),
            // The same time on another thread, and what comes after.
            event("mm", 2, 20, 30),
            event("add", 1, 100, 40),
        ];
        assert_eq!(own_times(&events), [20, 75, 5, 30, 40]);
        let kernels = kernels(&events);
        let found: Vec<_> = kernels.iter().map(|k| (k.name.as_str(), k.calls, (k.secs * 1e9).round() as i64)).collect();
        assert_eq!(found, [("mm", 2, 105), ("add", 1, 40), ("matmul", 1, 20), ("empty", 1, 5)]);
        assert!((kernels.iter().map(|k| k.share).sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
