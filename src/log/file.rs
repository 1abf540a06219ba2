//! A file that grows while a run goes on, and that a full disk keeps waiting instead of ending the run.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{self, Disk, DiskFile};
use crate::error::{Error, Result};

/// The bytes that may be held in memory for a file that nobody syncs; beyond them it syncs itself.
const MOST_HELD: usize = 1 << 20;

/// A file that is only written at its end.
///
/// Bytes are handed to the system at once, so that a killed process loses none. Those that do not fit on a full disk wait
/// here, and go first when something is appended or synced later: the file never has a gap, nor a byte twice. What was not
/// synced yet is held in memory too, because a system that fails to bring it to the disk may drop it and say so only once.
#[derive(Debug)]
pub(super) struct LogFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    end: Mutex<End>,
    /// Held by the one sync in flight, which must not keep those that append waiting.
    in_sync: Mutex<()>,
}

/// The file from its last byte that is known to be on the disk.
#[derive(Debug)]
struct End {
    file: Arc<dyn DiskFile>,
    /// The bytes that are on the disk.
    n_synced: u64,
    /// The bytes after them.
    held: Vec<u8>,
    /// How many of those the system has.
    n_written: usize,
    /// A sync has failed, so the system may have lost those that it had.
    is_doubtful: bool,
}

impl LogFile {
    /// Begins an empty file, whose name is then on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn create(disk: &Arc<dyn Disk>, path: &Path) -> Result<Self> {
        let file = disk.create(path).map_err(Error::io("create", path))?;
        disk::sync_parent(&**disk, path)?;
        Ok(Self::new(disk, path, file, 0))
    }

    /// Goes on with a file, or begins it; its name is then on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn append_to(disk: &Arc<dyn Disk>, path: &Path) -> Result<Self> {
        let file = disk.append(path).map_err(Error::io("open", path))?;
        disk::sync_parent(&**disk, path)?;
        let n_bytes = match path.metadata() {
            Ok(found) => found.len(),
            // A disk that keeps nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        Ok(Self::new(disk, path, file, n_bytes))
    }

    fn new(disk: &Arc<dyn Disk>, path: &Path, file: Box<dyn DiskFile>, n_synced: u64) -> Self {
        let end = End { file: Arc::from(file), n_synced, held: Vec::new(), n_written: 0, is_doubtful: false };
        Self { disk: disk.clone(), path: path.to_owned(), end: Mutex::new(end), in_sync: Mutex::new(()) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes bytes after those that wait. Where the disk is full the rest waits, and that is no error.
    ///
    /// # Errors
    /// [`Error::Io`] of any other kind.
    pub(super) fn append(&self, bytes: &[u8]) -> Result<()> {
        let mut end = self.lock();
        end.held.extend_from_slice(bytes);
        let caught_up = self.catch_up(&mut end);
        let is_much = end.held.len() > MOST_HELD;
        drop(end);
        let done = caught_up.and_then(|()| if is_much { self.sync() } else { Ok(()) });
        done.or_else(|error| if is_full(&error) { Ok(()) } else { Err(error) })
    }

    /// Brings everything that was appended before to the disk.
    ///
    /// # Errors
    /// [`Error::Io`]; also when bytes still wait because the disk is full.
    pub(super) fn sync(&self) -> Result<()> {
        let _one_at_a_time = self.in_sync.lock().unwrap_or_else(PoisonError::into_inner);
        let mut end = self.lock();
        self.catch_up(&mut end)?;
        let (file, n_held) = (end.file.clone(), end.held.len());
        drop(end);
        let synced = file.sync();
        let mut end = self.lock();
        match synced {
            Ok(()) => {
                end.held.drain(..n_held);
                end.n_written -= n_held;
                end.n_synced += n_held as u64;
                Ok(())
            }
            Err(error) => {
                end.is_doubtful = true;
                Err(Error::io("sync", &self.path)(error))
            }
        }
    }

    /// Whether bytes wait for room on the disk.
    pub(super) fn is_waiting(&self) -> bool {
        let end = self.lock();
        end.n_written < end.held.len()
    }

    fn lock(&self) -> MutexGuard<'_, End> {
        // Every step of what is done under the lock leaves a state that is true.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands the system all bytes that it does not have.
    fn catch_up(&self, end: &mut End) -> Result<()> {
        if end.is_doubtful {
            return self.write_anew(end);
        }
        while end.n_written < end.held.len() {
            match end.file.write(&end.held[end.n_written..]) {
                Ok(0) => return Err(Error::io("write", &self.path)(ErrorKind::WriteZero.into())),
                Ok(n_bytes) => end.n_written += n_bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("write", &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Puts a file in place of the one that a failed sync has left in doubt.
    fn write_anew(&self, end: &mut End) -> Result<()> {
        let read = |n_bytes: u64| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::open(&self.path)?.take(n_bytes).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let mut bytes = read(end.n_synced).map_err(Error::io("read", &self.path))?;
        bytes.extend_from_slice(&end.held);
        // The old file is written no more, so until the new one is there all of it waits.
        end.n_written = 0;
        disk::put_file(&*self.disk, &self.path, &bytes)?;
        let file = self.disk.append(&self.path).map_err(Error::io("open", &self.path))?;
        let n_synced = bytes.len() as u64;
        *end = End { file: Arc::from(file), n_synced, held: Vec::new(), n_written: 0, is_doubtful: false };
        Ok(())
    }
}

/// Whether an error says that there is no room on the disk.
fn is_full(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. }
        if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge))
}
