//! Signals. Ctrl-C, SIGTERM and the end of the terminal ask a command to stop in good order, and end it at once when they
//! come again later; SIGUSR1 asks a run for a checkpoint. A file that may not grow is an error, not a signal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::{flag, low_level};

use crate::error::{Error, Result};
use crate::run::requests::Requests;
use crate::torch::signal_mask;

/// The signals that any command has a handler for.
const HANDLED: [i32; 4] = [SIGHUP, SIGINT, SIGTERM, SIGUSR1];

/// Signals to stop within this time of the first are the same request: at a time limit SLURM sends SIGTERM twice within 10 ms,
/// and srun sends a Ctrl-C twice by itself.
const ONE_REQUEST: Duration = Duration::from_secs(3);

/// Handlers need little more than the frame that the system makes, which can take some ten kilobytes.
const STACK_BYTES: usize = 128 << 10;

/// Has a thread of its own take the signals, so that none that computes does. Called before any other thread is there.
pub(super) fn in_a_thread_of_their_own() {
    // A write beyond the limit on the size of files (`ulimit -f`) fails then, as on a full disk.
    signal_mask::ignore(SIGXFSZ);
    signal_mask::block(&HANDLED);
    let take = || {
        signal_mask::unblock(&HANDLED);
        loop {
            std::thread::park();
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned()).stack_size(STACK_BYTES);
    if thread.spawn(take).is_err() {
        // Better on a thread that computes than not at all.
        signal_mask::unblock(&HANDLED);
    }
}

/// Makes each signal to stop end the program at once, with 128 and its number as the exit code: for commands that leave
/// nothing behind.
pub(super) fn end_at_once() -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::new(AtomicBool::new(true))).map_err(refused)?;
    }
    Ok(())
}

/// Listens to the signals to stop; the number of the one that came stands in the returned cell, 0 before. One that comes
/// again more than [`ONE_REQUEST`] later ends the program.
pub(super) fn listen() -> Result<Arc<AtomicUsize>> {
    let stop = Arc::new(AtomicUsize::new(0));
    note(&[SIGINT, SIGTERM], &stop, &Arc::new(AtomicBool::new(false)))?;
    Ok(stop)
}

/// Listens for a run. Until it begins to write, a signal to stop ends the program.
pub(super) fn listen_for_run() -> Result<Requests> {
    let requests = Requests { ends_at_once: Arc::new(AtomicBool::new(true)), ..Requests::default() };
    let mut signals = vec![SIGINT, SIGTERM];
    // Who starts a run by `nohup` wants it to outlive the terminal.
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    note(&signals, &requests.stop, &requests.ends_at_once)?;
    flag::register(SIGUSR1, Arc::clone(&requests.save)).map_err(refused)?;
    Ok(requests)
}

fn note(signals: &[i32], stop: &Arc<AtomicUsize>, ends_at_once: &Arc<AtomicBool>) -> Result<()> {
    let mut signals = Signals::new(signals).map_err(refused)?;
    let (stop, ends_at_once) = (Arc::clone(stop), Arc::clone(ends_at_once));
    let take = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            if first.is_some_and(|first| first.elapsed() < ONE_REQUEST) {
                continue;
            }
            if ends_at_once.swap(true, Ordering::SeqCst) {
                low_level::exit(128 + signal);
            }
            stop.store(signal as usize, Ordering::SeqCst);
            first = Some(Instant::now());
        }
    };
    std::thread::Builder::new().name("requests".to_owned()).spawn(take).map_err(refused)?;
    Ok(())
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

fn refused(error: std::io::Error) -> Error {
    Error::failed("signals", format!("cannot be listened to: {error}"))
}
