//! Checkpoints in the background: a thread writes a snapshot while the run goes on, one at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::retention::{Keep, prune};
use super::save::Snapshot;
use crate::disk::Disk;
use crate::error::{Error, Result};

/// Writes the checkpoints of a run.
#[derive(Debug)]
pub struct Saver {
    disk: Arc<dyn Disk>,
    checkpoints_dir: PathBuf,
    keep: Keep,
    in_flight: Option<InFlight>,
}

#[derive(Debug)]
struct InFlight {
    step: u64,
    thread: JoinHandle<Result<Saved>>,
}

/// A checkpoint that is whole and on the disk.
#[derive(Debug)]
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Its size.
    pub bytes: u64,
    /// Seconds from the hand-over until it was on the disk.
    pub write_secs: f64,
    /// Why old checkpoints could not be deleted.
    pub not_pruned: Option<Error>,
}

/// What became of the checkpoint of a step.
pub type SaveOutcome = (u64, Result<Saved>);

impl Saver {
    /// Writes nothing yet.
    pub fn new(disk: Arc<dyn Disk>, checkpoints_dir: PathBuf, keep: Keep) -> Self {
        Self { disk, checkpoints_dir, keep, in_flight: None }
    }

    /// Begins to write a snapshot; none may be in flight. `before` is done first, on the thread that writes: what must be
    /// on the disk before the checkpoint is.
    ///
    /// # Errors
    /// [`Error::Failed`] when the system gives no thread.
    pub fn begin(&mut self, snapshot: Snapshot, before: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        assert!(self.in_flight.is_none(), "one checkpoint is written at a time");
        let (disk, dir, keep) = (Arc::clone(&self.disk), self.checkpoints_dir.clone(), self.keep.clone());
        let step = snapshot.record.state.step;
        let write = move || {
            let started = Instant::now();
            before()?;
            let (_, manifest) = snapshot.save(&*disk, &dir)?;
            let write_secs = started.elapsed().as_secs_f64();
            let not_pruned = prune(&*disk, &dir, step, &keep).err();
            Ok(Saved { step, bytes: manifest.n_bytes(), write_secs, not_pruned })
        };
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(write)
            .map_err(|error| Error::failed("checkpoint", format!("no thread to write it: {error}")))?;
        self.in_flight = Some(InFlight { step, thread });
        Ok(())
    }

    /// What became of the checkpoint in flight, if it is done.
    pub fn poll(&mut self) -> Option<SaveOutcome> {
        let is_done = self.in_flight.as_ref().is_some_and(|in_flight| in_flight.thread.is_finished());
        if is_done { self.wait() } else { None }
    }

    /// Waits for the checkpoint in flight, if there is one.
    pub fn wait(&mut self) -> Option<SaveOutcome> {
        let InFlight { step, thread } = self.in_flight.take()?;
        let saved =
            thread.join().unwrap_or_else(|panic| Err(Error::of_panic("the thread that writes checkpoints", &*panic)));
        Some((step, saved))
    }
}

impl Drop for Saver {
    /// A run that ends by an error leaves the checkpoint in flight whole.
    fn drop(&mut self) {
        let _ = self.wait();
    }
}
