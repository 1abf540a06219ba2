//! Copies between host and device that do not hold either up.

use std::ffi::{c_int, c_void};

use tch::kind::Element;
use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{check, raw, taken};
use crate::error::Result;

unsafe extern "C" {
    fn bellora_pinned(x: *mut C_tensor, out: *mut *mut C_tensor) -> c_int;
    fn bellora_event_record(device_index: c_int, event: *mut *mut c_void) -> c_int;
    fn bellora_event_wait(event: *mut c_void) -> c_int;
    fn bellora_event_free(event: *mut c_void);
}

/// Copies values to a device. On a GPU they go through pinned memory, behind the work that is queued there, and the
/// host does not wait; libtorch keeps the pinned memory until the copy is over.
pub fn upload<T: Element>(values: &[T], device: Device) -> Result<Tensor> {
    let host = Tensor::f_from_slice(values)?;
    if !device.is_cuda() {
        return Ok(host);
    }
    let mut pinned = std::ptr::null_mut();
    // SAFETY: `host` is a live tensor for the length of the call; `pinned` is written on success.
    let code = unsafe { bellora_pinned(raw(&host), &mut pinned) };
    Ok(taken(code, pinned)?.f_to_device_(device, T::KIND, true, false)?)
}

/// A tensor on its way to the host.
#[derive(Debug)]
pub struct Arriving {
    host: Tensor,
    event: Option<Event>,
}

impl Arriving {
    /// Queues the copy of a tensor, as it will be when the work queued before is done.
    pub fn queue(tensor: &Tensor) -> Result<Self> {
        let host = tensor.f_to_device_(Device::Cpu, tensor.kind(), true, true)?;
        let event = match tensor.device() {
            Device::Cuda(index) => Some(Event::record(index)?),
            _ => None,
        };
        Ok(Self { host, event })
    }

    /// Waits until it is there; work queued later is not waited for.
    pub fn wait(self) -> Result<Tensor> {
        if let Some(event) = &self.event {
            event.wait()?;
        }
        Ok(self.host)
    }
}

/// A mark in the device's queue.
#[derive(Debug)]
struct Event(*mut c_void);

impl Event {
    fn record(device_index: usize) -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: on success the shim writes the address of an event that is freed on drop alone.
        check(unsafe { bellora_event_record(device_index as c_int, &mut event) })?;
        Ok(Self(event))
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        check(unsafe { bellora_event_wait(self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, and nobody else frees it.
        unsafe { bellora_event_free(self.0) }
    }
}
