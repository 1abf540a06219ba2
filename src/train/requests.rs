//! What is asked of a run from outside while it goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Cells that signal handlers write and the run reads.
#[derive(Debug, Default)]
pub struct Requests {
    /// The number of a signal that asked the run to stop, 0 before.
    pub stop: Arc<AtomicUsize>,
    /// Whether a checkpoint was asked for.
    pub save: Arc<AtomicBool>,
    /// Whether a signal is to end the program at once: before there is anything to lose, and once it has been asked to
    /// stop already.
    pub ends_at_once: Arc<AtomicBool>,
}

impl Requests {
    /// From here on there is something to lose: the first signal is only noted.
    pub(super) fn wait_for_the_step(&self) {
        self.ends_at_once.store(false, Ordering::SeqCst);
    }

    /// The number of the signal that asked the run to stop.
    pub(super) fn stop_signal(&self) -> Option<usize> {
        Some(self.stop.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// Whether a checkpoint was asked for since the last time.
    pub(super) fn take_save(&self) -> bool {
        self.save.swap(false, Ordering::SeqCst)
    }
}
