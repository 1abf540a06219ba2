//! Whether a run's folder, an adapter or an exported model is whole, part by part. Reads only.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::folder::is_incomplete;
use crate::checkpoint::manifest::{MANIFEST_FILE, checkpoints, step_dir, verify};
use crate::checkpoint::state::{Record, STATE_FILE};
use crate::config::Config;
use crate::disk::{is_temporary, names};
use crate::error::{Error, Fault, Result};
use crate::log::{EVENTS_DIR, count_records};
use crate::log::{METRICS_FILE, Metrics};
use crate::run::folder::{ADAPTER_DIR, CHECKPOINTS_DIR, CONFIG_FILE, holds_run};

/// Faults of one file of lines that are told at most.
const N_TOLD: usize = 3;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Whether no part is damaged.
    pub whole: bool,
    /// The parts.
    pub parts: Vec<VerifiedPart>,
}

/// A file or folder that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedPart {
    /// Its name below the folder that was asked about.
    pub name: String,
    /// What it is.
    pub verdict: Verdict,
    /// What is damaged; else what it holds, or why it is harmless.
    pub details: Vec<String>,
}

/// What a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it was written.
    Whole,
    /// Otherwise than it was written.
    Damaged,
    /// Left by something that was interrupted, or being written right now; nothing reads it.
    Harmless,
}

impl Verdict {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Damaged => "damaged",
            Self::Harmless => "harmless",
        }
    }
}

/// Looks at everything in a folder that a checksum or a rule can be held against: of a run its config, its metrics, its
/// checkpoints and adapters; else the files that a manifest lists.
///
/// # Errors
/// [`Error::Invalid`] for a folder that is neither; [`Error::Io`] for one that cannot be read.
pub fn inspect(dir: &Path) -> Result<Verification> {
    let refused = |what: &str| {
        Error::invalid(dir.display().to_string(), what)
            .hint("name the folder that train.output named, an adapter/ of a run, or what `bellora export` wrote")
    };
    if !dir.is_dir() {
        return Err(refused("is no folder that is there"));
    }
    let checkpoints = checkpoints(&dir.join(CHECKPOINTS_DIR))?;
    let parts = if holds_run(dir) || dir.join(METRICS_FILE).is_file() || !checkpoints.is_empty() {
        parts_of_run(dir, &checkpoints)?
    } else if dir.join(MANIFEST_FILE).is_file() {
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
        vec![folder(dir, &name).0]
    } else {
        return Err(refused(&format!("holds neither a run ({CONFIG_FILE}) nor a {MANIFEST_FILE}")));
    };
    Ok(Verification { whole: parts.iter().all(|part| part.verdict != Verdict::Damaged), parts })
}

fn parts_of_run(dir: &Path, checkpoints: &[(u64, PathBuf)]) -> Result<Vec<VerifiedPart>> {
    let mut parts = vec![config(dir)];
    let mut newest = None;
    for (_, checkpoint) in checkpoints {
        let (part, record) = folder(checkpoint, &below(dir, checkpoint));
        // One that is gone by now was deleted by its run, which goes on.
        if checkpoint.is_dir() {
            newest = record.filter(|_| part.verdict == Verdict::Whole).or(newest);
            parts.push(part);
        }
    }
    // After the checkpoints: none of them knows of a step whose line was not written before.
    parts.extend(metrics(dir, newest.as_ref())?);
    parts.extend(events(dir)?);
    for name in names(dir)? {
        let path = dir.join(&name);
        let is_adapter = name == ADAPTER_DIR || path.join(MANIFEST_FILE).is_file();
        if path.is_dir() && is_adapter && !is_incomplete(&name) {
            parts.push(folder(&path, &name).0);
        }
    }
    for place in [dir, &dir.join(CHECKPOINTS_DIR)] {
        let left = names(place)?.into_iter().filter(|name| is_incomplete(name) || is_temporary(name));
        parts.extend(left.map(|name| VerifiedPart {
            name: below(dir, &place.join(name)),
            verdict: Verdict::Harmless,
            details: vec!["left by something that was interrupted, or being written now; nothing reads it".to_owned()],
        }));
    }
    Ok(parts)
}

/// A path as it is named below a folder.
fn below(dir: &Path, path: &Path) -> String {
    path.strip_prefix(dir).unwrap_or(path).display().to_string()
}

/// Puts a part together from its faults.
fn part(name: &str, faults: Vec<String>, details: Vec<String>) -> VerifiedPart {
    match faults.is_empty() {
        true => VerifiedPart { name: name.to_owned(), verdict: Verdict::Whole, details },
        false => VerifiedPart { name: name.to_owned(), verdict: Verdict::Damaged, details: faults },
    }
}

/// The words of an error, its places named below a folder.
fn faults_of(dir: &Path, error: &Error) -> Vec<String> {
    match error.faults() {
        [] => vec![error.to_string()],
        faults => {
            let fault = |fault: &Fault| format!("{}: {}", below(dir, Path::new(&fault.place)), fault.what);
            faults.iter().map(fault).collect()
        }
    }
}

/// A folder with a manifest, and what it says of its run if it is a checkpoint.
fn folder(dir: &Path, name: &str) -> (VerifiedPart, Option<Record>) {
    let manifest = match verify(dir) {
        Ok(manifest) => manifest,
        Err(error) => return (part(name, faults_of(dir, &error), Vec::new()), None),
    };
    let details = vec![format!("{} files, {:.1} MB", manifest.files.len(), manifest.n_bytes() as f64 / 1e6)];
    if !manifest.files.contains_key(STATE_FILE) {
        return (part(name, Vec::new(), details), None);
    }
    match Record::read(dir) {
        Err(error) => (part(name, faults_of(dir, &error), details), None),
        Ok(record) => {
            // A checkpoint under another's name would be taken for that.
            let step = record.state.step;
            let is_named_so = dir.file_name() == step_dir(dir, step).file_name();
            let faults = if is_named_so { Vec::new() } else { vec![format!("{STATE_FILE}: is of step {step}")] };
            (part(name, faults, details), Some(record))
        }
    }
}

fn config(dir: &Path) -> VerifiedPart {
    let path = dir.join(CONFIG_FILE);
    // Where the files lie that it names is no matter of this folder.
    let faults = match Config::load_without_files(Some(&path), &[]) {
        Ok(_) => Vec::new(),
        Err(error) => faults_of(dir, &error),
    };
    part(CONFIG_FILE, faults, Vec::new())
}

/// Every update must stand there once and in order, up to the newest checkpoint at least. `None`: there is no such file, and
/// nothing yet that it should tell of.
fn metrics(dir: &Path, newest: Option<&Record>) -> Result<Option<VerifiedPart>> {
    let path = dir.join(METRICS_FILE);
    let Some(metrics) = Metrics::read(&path)? else {
        let faults = vec!["missing".to_owned()];
        return Ok(newest.map(|_| part(METRICS_FILE, faults, Vec::new())));
    };
    let (mut last, mut faults, mut n_lines, mut details) = (0, Vec::new(), 0, Vec::new());
    for (at, line) in (1..).zip(metrics.lines()) {
        let Some(step) = line.step else {
            match line.is_whole() {
                true => faults.push(format!("line {at}: is no line of metrics")),
                false => details.push("the last line is torn or being written; a resume drops it".to_owned()),
            }
            continue;
        };
        n_lines += u64::from(newest.is_some_and(|record| step <= record.state.step));
        if !line.is_update {
            continue;
        }
        match step {
            step if step == last + 1 => {}
            step if step <= last => faults.push(format!("line {at}: step {step} comes after step {last}")),
            step if step == last + 2 => faults.push(format!("line {at}: step {} is missing before it", last + 1)),
            step => faults.push(format!("line {at}: steps {} to {} are missing before it", last + 1, step - 1)),
        }
        last = step;
    }
    if let Some(record) = newest {
        let (step, known) = (record.state.step, record.metrics_lines);
        if last < step {
            faults.push(format!("ends with step {last}, and there is a checkpoint of step {step}"));
        } else if n_lines != known {
            faults.push(format!("has {n_lines} lines up to step {step}, and the checkpoint knows of {known}"));
        }
    }
    if faults.len() > N_TOLD {
        let more = faults.split_off(N_TOLD).len();
        faults.push(format!("and {more} more"));
    }
    details.insert(0, format!("{last} updates"));
    Ok(Some(part(METRICS_FILE, faults, details)))
}

/// TensorBoard's files have a checksum in every record.
fn events(dir: &Path) -> Result<Option<VerifiedPart>> {
    let (mut faults, mut n_records) = (Vec::new(), 0);
    let files = names(&dir.join(EVENTS_DIR))?;
    for name in &files {
        let path = dir.join(EVENTS_DIR).join(name);
        match count_records(&std::fs::read(&path).map_err(Error::io("read", &path))?) {
            Ok(n) => n_records += n,
            Err(at) => faults.push(format!("{name}: the record at byte {at} is damaged")),
        }
    }
    let details = vec![format!("{n_records} records in {} files", files.len())];
    Ok((!files.is_empty()).then(|| part(EVENTS_DIR, faults, details)))
}
