//! How long work takes on a device.

use std::time::Instant;

use tch::Device;

use super::transfer::Event;
use crate::error::Result;

/// Seconds that the work of a call takes: on a GPU between two marks in its queue, so that the host's own time does not count.
///
/// # Errors
/// What the call returns; work that fails on the device.
pub fn seconds_of(device: Device, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let Device::Cuda(index) = device else {
        let started = Instant::now();
        call()?;
        return Ok(started.elapsed().as_secs_f64());
    };
    let started = Event::record_timed(index)?;
    call()?;
    let ended = Event::record_timed(index)?;
    ended.wait()?;
    started.seconds_until(&ended)
}
