//! What is asked of a run from outside while it goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::engine::optim::control::Asks;
use crate::error::STOP_SIGNALS;

/// Where the requests for a checkpoint are counted, behind those of the signals to stop.
const SAVE: usize = STOP_SIGNALS.len();

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

    /// Notes that the checkpoint that was asked for is about to be written.
    pub(super) fn save_is_done(&self) {
        self.save.store(false, Ordering::SeqCst);
    }

    /// What this process was asked, for the other ranks: a count of each signal to stop, and of checkpoints.
    pub(super) fn counts(&self) -> Asks {
        let stop = self.stop.load(Ordering::SeqCst);
        let [hangup, interrupt, terminate] = STOP_SIGNALS.map(|signal| f64::from(u8::from(signal == stop)));
        [hangup, interrupt, terminate, f64::from(u8::from(self.save.load(Ordering::SeqCst)))]
    }
}

/// Takes the requests for a checkpoint out of what was asked.
pub(super) fn forget_saves(asked: &mut Asks) {
    asked[SAVE] = 0.0;
}

/// What all ranks know that one of them was asked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Agreed {
    /// The number of a signal to stop.
    pub(super) stop: Option<usize>,
    /// Whether to save.
    pub(super) save: bool,
}

impl Agreed {
    /// Reads what the ranks' counts add up to.
    pub(super) fn of(counts: &Asks) -> Self {
        let stop = STOP_SIGNALS.into_iter().zip(counts).find(|(_, count)| **count > 0.0);
        Self { stop: stop.map(|(signal, _)| signal), save: counts[SAVE] > 0.0 }
    }
}
