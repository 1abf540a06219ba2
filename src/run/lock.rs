//! One process at a time in a run folder.
//!
//! The system holds the lock and lets go of it when the process ends, however it ends: a lock never outlives its owner.
//! The file's text only says who that is; one that is found in a free lock tells of a process that was killed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// The file that is locked.
const LOCK_FILE: &str = "run.lock";

/// The lock of a run folder, held until it is dropped.
#[derive(Debug)]
pub(super) struct RunLock {
    file: File,
    /// Who left its name in it: a process that ended without a word.
    pub(super) stale: Option<String>,
    /// Why nothing is locked: a file system without locks.
    pub(super) missing: Option<String>,
    is_signed: bool,
}

impl RunLock {
    /// Takes the lock of a folder that exists.
    ///
    /// # Errors
    /// [`Error::Failed`] while another process holds it; [`Error::Io`].
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_FILE);
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(Error::io("open", &path))?;
        let mut missing = None;
        let locked = file.try_lock();
        let mut owner = String::new();
        // Not worth an error: the text is for people.
        let _ = file.read_to_string(&mut owner);
        let owner = Some(owner.trim().to_owned()).filter(|owner| !owner.is_empty());
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let who = owner.unwrap_or_else(|| "another process".to_owned());
                return Err(Error::failed(dir.display().to_string(), format!("{who} is at work on this run")).hint(
                    "wait for it, or stop it by Ctrl-C or `kill -INT`: two processes would spoil each other's files",
                ));
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Interrupted => {
                return Err(Error::io("lock", &path)(error));
            }
            Err(TryLockError::Error(error)) => missing = Some(error.to_string()),
        }
        Ok(Self { file, stale: owner, missing, is_signed: false })
    }

    /// Writes who holds the lock.
    pub(super) fn sign(&mut self) {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        // Not worth an error, as above.
        self.is_signed = true;
        let _ = self.replace(&format!("process {} on {host}\n", std::process::id()));
    }

    fn replace(&mut self, text: &str) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(text.as_bytes())
    }
}

impl Drop for RunLock {
    /// Takes the name out: this process ends in good order. The lock goes with the file.
    fn drop(&mut self) {
        if self.is_signed {
            let _ = self.file.set_len(0);
        }
    }
}
