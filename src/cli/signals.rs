//! Ctrl-C and SIGTERM: the first asks the run to stop in good order, the second stops the program at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Makes either signal end the program at once, with 128 and its number as the exit code: for commands that leave
/// nothing behind.
pub(super) fn end_at_once() -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::new(AtomicBool::new(true))).map_err(refused)?;
    }
    Ok(())
}

fn refused(error: std::io::Error) -> Error {
    Error::failed("signals", format!("cannot be listened to: {error}"))
}

/// Listens to both signals; the number of the first one that comes stands in the returned cell, 0 before.
pub(super) fn listen() -> Result<Arc<AtomicUsize>> {
    let stop = Arc::new(AtomicUsize::new(0));
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Order matters: on the second signal `asked` is set already and the program ends here.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked)).map_err(refused)?;
        flag::register(signal, Arc::clone(&asked)).map_err(refused)?;
        flag::register_usize(signal, Arc::clone(&stop), signal as usize).map_err(refused)?;
    }
    Ok(stop)
}
