//! Which checkpoints stay.

use std::path::{Path, PathBuf};

use super::manifest::{checkpoints, remove_whole};
use crate::error::Result;

/// Deletes old checkpoints after the one of `newest_step` was written whole: it and the `keep - 1` before it stay.
///
/// Checkpoints of later steps stay as they are: they are left from before a resume, and their steps will come again.
/// Gives what was deleted.
///
/// # Errors
/// [`crate::error::Error::Io`].
pub fn prune(checkpoints_dir: &Path, newest_step: u64, keep: usize) -> Result<Vec<PathBuf>> {
    let mut until_newest = checkpoints(checkpoints_dir)?;
    until_newest.retain(|(step, _)| *step <= newest_step);
    let n_old = until_newest.len().saturating_sub(keep.max(1));
    let old: Vec<_> = until_newest.into_iter().take(n_old).map(|(_, dir)| dir).collect();
    for dir in &old {
        remove_whole(dir)?;
    }
    Ok(old)
}
