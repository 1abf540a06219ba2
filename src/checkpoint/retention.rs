//! Which checkpoints stay.

use std::path::{Path, PathBuf};

use super::folder::remove_whole;
use super::manifest::{checkpoints, verify_sizes};
use super::state::Record;
use crate::disk::Disk;
use crate::error::Result;

/// The checkpoints that a run keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// How many of the newest, at least 1.
    pub newest: usize,
    /// How many of those with the lowest evaluation loss.
    pub best: usize,
    /// Steps whose checkpoints are never deleted.
    pub steps: Vec<u64>,
}

/// Deletes old checkpoints after the one of `newest_step` was written whole.
///
/// A checkpoint that has lost a file or a part of one does not count among those that are kept; it goes when as many
/// newer ones are whole as are to be kept. Checkpoints of later steps stay as they are: they are left from before a
/// resume, and their steps will come again. Gives what was deleted.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn prune(disk: &dyn Disk, checkpoints_dir: &Path, newest_step: u64, keep: &Keep) -> Result<Vec<PathBuf>> {
    let mut until_newest = checkpoints(checkpoints_dir)?;
    until_newest.retain(|(step, _)| *step <= newest_step);
    let whole: Vec<&(u64, PathBuf)> = until_newest.iter().filter(|(_, dir)| verify_sizes(dir).is_ok()).collect();
    let Some((oldest_of_newest, _)) = whole.iter().rev().take(keep.newest.max(1)).next_back() else {
        return Ok(Vec::new());
    };
    let best = best(&whole, keep.best);
    let is_old = |step: &u64| step < oldest_of_newest && !keep.steps.contains(step) && !best.contains(step);
    let old: Vec<PathBuf> = until_newest.iter().filter(|(step, _)| is_old(step)).map(|(_, dir)| dir.clone()).collect();
    for dir in &old {
        remove_whole(disk, dir)?;
    }
    Ok(old)
}

/// The steps of the checkpoints with the lowest evaluation loss; of equal ones the oldest.
fn best(whole: &[&(u64, PathBuf)], count: usize) -> Vec<u64> {
    if count == 0 {
        return Vec::new();
    }
    let mut evaluated: Vec<(f64, u64)> = whole
        .iter()
        .filter_map(|(step, dir)| Some((Record::read(dir).ok()?.eval_loss()?, *step)))
        .filter(|(loss, _)| !loss.is_nan())
        .collect();
    evaluated.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    evaluated.into_iter().take(count).map(|(_, step)| step).collect()
}
