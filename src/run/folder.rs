//! The files of a run folder.

use std::path::{Path, PathBuf};

use crate::checkpoint::manifest::{MANIFEST_FILE, verify};
use crate::config::Config;
use crate::disk::{Disk, sync_parent};
use crate::error::{Error, Result, shell_quoted};
use crate::log::{METRICS_FILE, Metrics};

/// The run's own resolved config.
pub const CONFIG_FILE: &str = "config.toml";
/// The folder of the final adapter.
pub const ADAPTER_DIR: &str = "adapter";
/// The folder of the checkpoints.
pub const CHECKPOINTS_DIR: &str = "checkpoints";

/// Whether a folder holds a run.
pub fn holds_run(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).is_file()
}

/// Refuses a folder that holds no run.
///
/// # Errors
/// [`Error::Invalid`].
pub fn expect_run(dir: &Path) -> Result<()> {
    if holds_run(dir) {
        return Ok(());
    }
    let what = format!("holds no run: there is no {CONFIG_FILE}");
    Err(Error::invalid(dir.display().to_string(), what)
        .hint("name the folder that train.output named, or start one by `bellora train CONFIG`"))
}

/// The folder of a run's final adapter, if it is there.
pub fn finished_adapter(run_dir: &Path) -> Option<PathBuf> {
    Some(run_dir.join(ADAPTER_DIR)).filter(|dir| dir.is_dir())
}

/// Refuses an output folder that holds a run already, or what a run would write over.
///
/// # Errors
/// [`Error::Invalid`].
pub fn refuse_taken_output(config: &Config) -> Result<()> {
    let dir = &config.train.output;
    if holds_run(dir) {
        let what = format!("{} holds a run already", dir.display());
        return Err(Error::invalid("train.output", what).hint(format!(
            "go on with it by `bellora resume {}` or `--resume`, or choose another folder: --set train.output=OTHER",
            shell_quoted(dir)
        )));
    }
    for name in [ADAPTER_DIR, CHECKPOINTS_DIR, METRICS_FILE] {
        // A run that was killed before it wrote its config leaves empty metrics.
        if std::fs::symlink_metadata(dir.join(name)).is_ok_and(|found| !found.is_file() || found.len() > 0) {
            let what = format!("{} holds {name}, but no {CONFIG_FILE} of a run", dir.display());
            return Err(Error::invalid("train.output", what)
                .hint(format!("choose another folder: --set train.output=OTHER; or move {name} away")));
        }
    }
    Ok(())
}

/// Puts the metrics of a run that begins again beside those to come, under the first name that is free. Gives that name and how
/// many lines were kept; nothing where there were none.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn keep_old_metrics(disk: &dyn Disk, dir: &Path) -> Result<Option<(String, usize)>> {
    let path = dir.join(METRICS_FILE);
    let n_lines = Metrics::read(&path)?.map_or(0, |metrics| metrics.lines().count());
    if n_lines == 0 {
        return Ok(None);
    }
    let names = (1..).map(|number: u32| format!("metrics-{number}.jsonl"));
    let free = |name: &String| std::fs::symlink_metadata(dir.join(name)).is_err();
    let Some(name) = names.into_iter().find(free) else { return Ok(None) };
    disk.rename(&path, &dir.join(&name)).map_err(Error::io("rename", &path))?;
    sync_parent(disk, &path)?;
    Ok(Some((name, n_lines)))
}

/// Holds an adapter that a run wrote against its manifest.
///
/// # Errors
/// As [`verify`].
pub fn verify_adapter(dir: &Path) -> Result<()> {
    verify(dir).map(drop).map_err(|error| {
        error.hint_where_none(&format!(
            "copy the folder again from where it was whole; if it was changed on purpose, remove {}",
            shell_quoted(&dir.join(MANIFEST_FILE))
        ))
    })
}

/// The folder that the adapter of a run gets when the run goes on beyond its end.
pub(super) fn adapter_of_step(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("{ADAPTER_DIR}-step-{step:08}"))
}
