//! The room that the token cache takes: what interrupted writes left goes, and the files that were unused for longest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The end of the names of the cache's files.
pub(super) const TOKENS: &str = "tokens";
/// Of those that are being written, whose names begin with a point. Each is locked for as long.
pub(super) const TEMPORARY: &str = "tmp";

/// Deletes what writers that are gone left in the folder, then the files that were unused for longest until all take no more
/// than `max_bytes`; `used` stays whatever it takes.
///
/// Nothing depends on it, so that no failure is one: a file that cannot be deleted stays.
pub(super) fn make_room(folder: &Path, used: &Path, max_bytes: u64) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut kept: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some((name, end)) = path.file_name().and_then(|name| name.to_str()?.rsplit_once('.')) else { continue };
        if end == TEMPORARY && name.starts_with('.') && is_abandoned(&path) {
            let _ = fs::remove_file(&path);
        } else if end == TOKENS
            && let Ok(found) = fs::metadata(&path)
        {
            kept.push((found.modified().unwrap_or(SystemTime::UNIX_EPOCH), found.len(), path));
        }
    }
    kept.sort();
    let mut total: u64 = kept.iter().map(|(_, n_bytes, _)| n_bytes).sum();
    for (_, n_bytes, path) in kept.into_iter().filter(|(_, _, path)| path != used) {
        if total <= max_bytes {
            return;
        }
        if fs::remove_file(&path).is_ok() {
            total -= n_bytes;
        }
    }
}

/// Whether a file that was being written has no writer: nobody holds its lock. An empty one may be about to be locked.
fn is_abandoned(path: &Path) -> bool {
    let is_unlocked =
        |file: &File| -> std::io::Result<bool> { Ok(file.metadata()?.len() > 0 && file.try_lock().is_ok()) };
    File::open(path).and_then(|file| is_unlocked(&file)).unwrap_or(false)
}

/// Notes that a file is in use, by its time of modification. A file of another user stays as it is.
pub(super) fn note_use(path: &Path) {
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}
