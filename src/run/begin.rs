//! Where a run begins: in a new folder, or where the checkpoints of one that is there say, and whether it may.

use std::path::{Path, PathBuf};

use crate::checkpoint::manifest::{Newest, checkpoints, newest_good};
use crate::checkpoint::state::{BaseIdentity, Record};
use crate::comm::{Communicator, broadcast_bytes};
use crate::config::{Config, Difference, Meaning, values_of};
use crate::error::{Error, Fault, Result, shell_quoted};
use crate::run::folder::{
    CHECKPOINTS_DIR, CONFIG_FILE, expect_run, finished_adapter, holds_run, refuse_taken_output, verify_adapter,
};
use crate::run::lock::RunLock;
use crate::run::resume_position::computed_on;
use crate::run::setup::{CacheUse, Job};
use crate::run::start::{Host, Start};
use crate::run::training_loop::{Run, RunOutcome};

/// Starts a run in its output folder; with `resume` goes on with the run that is there, if any.
///
/// # Errors
/// [`Error::Invalid`] before any file is created; [`Error::Interrupted`] after a signal, when the present step is
/// finished and saved.
pub fn train(config: Config, resume: bool, host: &Host, ranks: Box<dyn Communicator>) -> Result<RunOutcome> {
    let n_ranks = ranks.world_size();
    together(ranks, host, || start_or_go_on(config, resume, host, n_ranks))
}

fn start_or_go_on(config: Config, resume: bool, host: &Host, n_ranks: usize) -> Result<Option<Start>> {
    let dir = config.train.output.clone();
    if resume && holds_run(&dir) {
        let lock = RunLock::take(&dir)?;
        return go_on(config, dir, lock, host, n_ranks);
    }
    refuse_taken_output(&config)?;
    let job = inspect(config, n_ranks, host.n_local_ranks)?;
    job.run_bytes().fit(&*host.disk, &dir, 0)?;
    Ok(Some(Start { job, dir, lock: None, from: None, notes: Vec::new(), damaged: Vec::new() }))
}

/// Goes on with the run of a directory, from its newest good checkpoint; `sets` override keys of its config.
///
/// # Errors
/// As [`train`].
pub fn resume(run_dir: &Path, sets: &[String], host: &Host, ranks: Box<dyn Communicator>) -> Result<RunOutcome> {
    let n_ranks = ranks.world_size();
    together(ranks, host, || {
        expect_run(run_dir)?;
        let lock = RunLock::take(run_dir)?;
        let config = Config::load_run(run_dir, sets)?;
        go_on(config, run_dir.to_path_buf(), lock, host, n_ranks)
    })
}

/// Has rank 0 decide where the run begins, and all ranks begin there. `None` is a run that is finished.
///
/// Rank 0 has read the samples by the time it says so: the token cache, where the ranks share one, is made once.
fn together(
    mut ranks: Box<dyn Communicator>,
    host: &Host,
    decide: impl FnOnce() -> Result<Option<Start>>,
) -> Result<RunOutcome> {
    let start = if ranks.rank() == 0 { decide()? } else { None };
    let settled = start.as_ref().map_or_else(String::new, |start| start.job.model.config.to_toml());
    let settled = broadcast_bytes(&mut *ranks, settled.into_bytes())?;
    if settled.is_empty() {
        return Ok(RunOutcome::AlreadyFinished);
    }
    let start = match start {
        Some(start) => start,
        None => Start::beside_rank_0(&String::from_utf8_lossy(&settled), ranks.world_size())?,
    };
    Run::open(start, host, ranks)?.run_to_end()
}

impl Start {
    /// The same job on another rank, which neither writes nor judges.
    fn beside_rank_0(settled: &str, n_ranks: usize) -> Result<Self> {
        // Rank 0 has looked for all on its machine, and takes its own part meanwhile.
        let job = inspect(Config::parse_to_read(settled, "the config of rank 0", &[])?, n_ranks, 1)?;
        let dir = job.model.config.train.output.clone();
        Ok(Self { job, dir, lock: None, from: None, notes: Vec::new(), damaged: Vec::new() })
    }
}

fn go_on(mut config: Config, dir: PathBuf, lock: RunLock, host: &Host, n_ranks: usize) -> Result<Option<Start>> {
    config.refuse_unwritable()?;
    let Newest { good, damaged } = newest_good(&dir.join(CHECKPOINTS_DIR))?;
    let from = match good {
        Some((_, checkpoint)) => {
            let record = Record::read(&checkpoint)?;
            Some((checkpoint, record))
        }
        None => None,
    };
    let adapter = finished_adapter(&dir);
    if from.is_none() && adapter.is_none() && !damaged.is_empty() {
        return Err(none_is_whole(&damaged, &dir));
    }
    let theirs = match &from {
        Some((_, record)) => record.config.clone(),
        None => values_of(&dir.join(CONFIG_FILE))?,
    };
    config.keep_settled(&theirs);
    let changes = config.differences(&theirs);
    refuse_another_run(&changes, from.is_some(), &dir)?;
    let is_longer_or_shorter = changes.iter().any(|change| change.meaning == Meaning::Length);
    if let Some(adapter) = &adapter {
        if !is_longer_or_shorter {
            verify_adapter(adapter)?;
            return Ok(None);
        }
        if from.is_none() {
            let what = "is finished, and no checkpoint is left that it could go on from".to_owned();
            return Err(Error::invalid(dir.display().to_string(), what)
                .hint("start a new run with model.init_adapter = its adapter"));
        }
    }
    let job = inspect(config, n_ranks, host.n_local_ranks)?;
    let mut notes = Vec::new();
    if let Some((_, record)) = &from {
        same_identity(&job, record, &changes, &dir)?;
        if record.state.step > job.total_steps {
            return Err(too_short(&job, record, &changes));
        }
        if adapter.is_some() && record.state.step == job.total_steps {
            return Ok(None);
        }
        notes = what_is_otherwise(&changes, &job, record);
    }
    let there = bytes_of_checkpoints(&dir.join(CHECKPOINTS_DIR))?;
    job.run_bytes().fit(&*host.disk, &dir, there)?;
    Ok(Some(Start { job, dir, lock: Some(lock), from, notes, damaged }))
}

fn inspect(config: Config, n_ranks: usize, n_local_ranks: usize) -> Result<Job> {
    let job = Job::inspect(config, CacheUse::Keep, n_ranks)?;
    job.expect_room(n_local_ranks)?;
    Ok(job)
}

/// Refuses a config by which the run would be another one.
fn refuse_another_run(changes: &[Difference], has_checkpoint: bool, dir: &Path) -> Result<()> {
    // Where files lie is judged by what is in them, once there is something to hold them against.
    let is_other = |change: &&Difference| match change.meaning {
        Meaning::Defines => true,
        Meaning::Contents => !has_checkpoint,
        _ => false,
    };
    if !changes.iter().any(|change| is_other(&change)) {
        return Ok(());
    }
    let faults = changes.iter().filter(|change| is_other(change) || change.meaning == Meaning::Contents);
    let fault = |change: &Difference| {
        Fault::new(&change.key, format!("is {} here, but the run was started with {}", change.ours, change.theirs))
    };
    let error = Error::Invalid(faults.map(fault).collect());
    Err(error.hint(format!("these define the run: set them back, or start another run than {}", dir.display())))
}

/// Refuses files that are not what the run was started with.
pub(super) fn same_identity(job: &Job, record: &Record, changes: &[Difference], dir: &Path) -> Result<()> {
    let theirs = &record.identity;
    let data = (job.identity().data != theirs.data).then(String::new);
    let mut faults = Vec::new();
    for (what, keys, other) in [
        ("the base model", &["model.base"][..], job.model.other_base(&theirs.base)),
        ("the training data", &["data.train", "model.tokenizer", "data.template"], data),
    ] {
        let Some(how) = other else { continue };
        let moved: Vec<_> = changes.iter().filter(|change| keys.contains(&change.key.as_str())).collect();
        let hint = "put the files back as they were, or start a new run";
        let how = if how.is_empty() { how } else { format!(": {how}") };
        let not_it = format!("{what} is not what the run in {} was started with{how}", dir.display());
        if moved.is_empty() {
            faults.push(Fault::new(keys[0], &not_it).hint(hint));
        }
        for Difference { key, ours, theirs, .. } in moved {
            faults.push(Fault::new(key, format!("is {ours} here and was {theirs}, and {not_it}")).hint(hint));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
}

fn too_short(job: &Job, record: &Record, changes: &[Difference]) -> Error {
    let key = changes.iter().find(|change| change.meaning == Meaning::Length && change.ours != "not set");
    let key = key.map_or("train.epochs", |change| &change.key);
    let what = format!("makes a run of {} steps, and {} are done already", job.total_steps, record.state.step);
    Error::invalid(key, what).hint("a run can be made longer, or end where it stands")
}

/// Says what is otherwise than when the checkpoint was written, though the run may go on so.
fn what_is_otherwise(changes: &[Difference], job: &Job, record: &Record) -> Vec<String> {
    let mut notes = Vec::new();
    let mut is_rounded_otherwise = false;
    for Difference { key, ours, theirs, meaning } in changes {
        notes.push(format!("{key} is {ours} here and was {theirs}"));
        is_rounded_otherwise |= *meaning == Meaning::Rounding;
    }
    let (ours, theirs) = (job.identity().validation, &record.identity.validation);
    if ours.is_some() && matches!(record.identity.base, BaseIdentity::Sum(_)) {
        notes.push(
            "an older version wrote the checkpoint: whether the validation samples are still the same is not known"
                .into(),
        );
    }
    if let (Some(ours), Some(theirs)) = (&ours, theirs)
        && ours != theirs
    {
        notes.push(
            "the validation samples are not those of the run so far: its evaluation losses before and after this step are of \
             different samples, keep_best's too"
                .to_owned(),
        );
    }
    if job.total_steps != record.schedule.total_steps {
        notes.push(format!(
            "the run has {} steps instead of {}: from step {} on the learning rate is that of a run of this length",
            job.total_steps,
            record.schedule.total_steps,
            record.state.step + 1,
        ));
    }
    let (here, there) = (computed_on(job), &record.computed_on);
    if here != *there {
        notes.push(format!("it computes on {here}, and the steps before on {there}"));
        is_rounded_otherwise = true;
    }
    if is_rounded_otherwise {
        notes.push(
            "sums are rounded otherwise: from here on the run is the same to rounding, not bit for bit".to_owned(),
        );
    }
    notes
}

/// Checkpoints that are all damaged: to start over would throw the run's metrics away, so that is left to the user.
fn none_is_whole(damaged: &[(PathBuf, Error)], run_dir: &Path) -> Error {
    let mut faults = Vec::new();
    for (path, error) in damaged {
        match error.faults() {
            [] => faults.push(Fault::new(path.display().to_string(), error.to_string())),
            known => faults.extend_from_slice(known),
        }
    }
    let dir = run_dir.join(CHECKPOINTS_DIR).display().to_string();
    faults.push(Fault::new(&dir, "holds no checkpoint that is whole").hint(format!(
        "mend one from a copy, or start over: move {} away, or name another train.output",
        shell_quoted(&dir)
    )));
    Error::Invalid(faults)
}

fn bytes_of_checkpoints(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for (_, checkpoint) in checkpoints(dir)? {
        for name in crate::disk::names(&checkpoint)? {
            bytes += std::fs::metadata(checkpoint.join(name)).map_or(0, |found| found.len());
        }
    }
    Ok(bytes)
}
