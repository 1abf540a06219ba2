//! The disk as a run uses it. Everything that must not be lost is written through a [`Disk`], so that tests can put one in
//! its place that fails, fills up or loses power at any of its operations. The product has [`LocalDisk`].

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// What changes a disk, and the room on it. Reading goes past it.
pub trait Disk: Debug + Send + Sync {
    /// Creates a folder and those above it, as far as they are missing. Their names are on the disk then.
///
/// # Errors
/// [`Error::Io`].
pub fn make_folder(disk: &dyn Disk, path: &Path) -> Result<()> {
    let is_missing = |above: &&Path| !above.as_os_str().is_empty() && !above.exists();
    let missing: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
    if !missing.is_empty() {
        disk.create_folder(path).map_err(Error::io("create", path))?;
    }
    missing.into_iter().try_for_each(|made| sync_parent(disk, made))
}

/// The name beside a file under which its next contents are written.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Deletes a file, or a folder with all that is in it; nothing if there is none.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_tree(disk: &dyn Disk, path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    if !found.is_dir() {
        return disk.remove_file(path).map_err(Error::io("delete", path));
    }
    for name in names(path)? {
        remove_tree(disk, &path.join(name))?;
    }
    disk.remove_folder(path).map_err(Error::io("delete", path))
}

/// Brings the name of a file or folder to the disk.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_parent(disk: &dyn Disk, path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    disk.sync_folder(parent).map_err(Error::io("sync", parent))
}

/// The bytes that may still be written to a place, whose folder need not exist yet; `None` where the system cannot say.
pub fn free_bytes(disk: &dyn Disk, path: &Path) -> Option<u64> {
    disk.free_bytes(path.ancestors().find(|above| above.is_dir())?).ok()
}

/// Gives the names in a folder, sorted; none when there is no such folder.
///
/// # Errors
/// [`Error::Io`].
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
