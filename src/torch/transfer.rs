//! Copies between host and device that do not hold either up.

use std::ffi::{c_int, c_void};

use tch::kind::Element;
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::{check, raw, taken};
use crate::error::Result;

unsafe extern "C" {
    fn bellora_pinned(x: *mut C_tensor, out: *mut *mut C_tensor) -> c_int;
    fn bellora_pinned_empty(like: *mut C_tensor, n: i64, out: *mut *mut C_tensor) -> c_int;
    fn bellora_copy_queued(to: *mut C_tensor, from: *mut C_tensor) -> c_int;
    fn bellora_event_record(device_index: c_int, is_timed: bool, event: *mut *mut c_void) -> c_int;
    fn bellora_event_wait(event: *mut c_void) -> c_int;
    fn bellora_event_elapsed(first: *mut c_void, second: *mut c_void, milliseconds: *mut f64) -> c_int;
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

/// Two buffers of host memory by which a tensor is filled in turn: while the device takes one, the host writes the other.
#[derive(Debug)]
pub struct TwoBuffers {
    buffers: [Tensor; 2],
    device: Device,
}

impl TwoBuffers {
    /// Buffers of `n` elements each for a tensor on a device: pinned memory for a GPU, which takes it without the host. libtorch
    /// keeps pinned memory for the next such call, and hands it out only when every copy from it is over.
    ///
    /// # Errors
    /// Memory that runs out.
    pub fn new(n: i64, kind: Kind, device: Device) -> Result<Self> {
        let one = || -> Result<Tensor> {
            if !device.is_cuda() {
                return Ok(Tensor::f_empty([n], (kind, Device::Cpu))?);
            }
            let like = Tensor::f_empty([0i64], (kind, Device::Cpu))?;
            let mut pinned = std::ptr::null_mut();
            // SAFETY: `like` is a live tensor for the length of the call; `pinned` is written on success.
            let code = unsafe { bellora_pinned_empty(raw(&like), n, &mut pinned) };
            taken(code, pinned)
        };
        Ok(Self { buffers: [one()?, one()?], device })
    }

    /// Fills a contiguous tensor of the buffers' dtype and device. `fill` writes a part of a buffer, `[n]` or fewer elements, from
    /// the element of the tensor on that it is told. The last copies may still be queued on the device afterwards.
    ///
    /// # Errors
    /// Those of `fill`; a device that fails.
    pub fn fill(&self, to: &Tensor, fill: impl FnMut(&Tensor, usize) -> Result<()>) -> Result<()> {
        let mark = || match self.device {
            Device::Cuda(index) => Ok(Some(Event::record(index)?)),
            _ => Ok(None),
        };
        in_turn(to, &self.buffers, fill, mark, |event| event.as_ref().map_or(Ok(()), Event::wait))
    }
}

/// [`TwoBuffers::fill`] with given ways to mark the end of a copy, and to wait for the mark before a buffer is written again.
fn in_turn<M>(
    to: &Tensor,
    buffers: &[Tensor; 2],
    mut fill: impl FnMut(&Tensor, usize) -> Result<()>,
    mut mark: impl FnMut() -> Result<M>,
    mut wait: impl FnMut(M) -> Result<()>,
) -> Result<()> {
    let flat = to.f_view([-1])?;
    let (n, piece) = (flat.numel(), buffers[0].numel());
    let mut copying: [Option<M>; 2] = [None, None];
    for (turn, first) in (0..n).step_by(piece).enumerate() {
        let (buffer, copying) = (&buffers[turn % 2], &mut copying[turn % 2]);
        copying.take().map_or(Ok(()), &mut wait)?;
        let len = piece.min(n - first) as i64;
        let part = buffer.f_narrow(0, 0, len)?;
        fill(&part, first)?;
        let there = flat.f_narrow(0, first as i64, len)?;
        // SAFETY: both are live tensors for the length of the call; the memory that is still read after it is the buffer's, which
        // is not written before the mark was waited for, and which libtorch keeps until then.
        check(unsafe { bellora_copy_queued(raw(&there), raw(&part)) })?;
        *copying = Some(mark()?);
    }
    Ok(())
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
pub(super) struct Event(*mut c_void);

impl Event {
    fn record(device_index: usize) -> Result<Self> {
        Self::marked(device_index, false)
    }

    /// A mark whose time can be asked for.
    pub(super) fn record_timed(device_index: usize) -> Result<Self> {
        Self::marked(device_index, true)
    }

    fn marked(device_index: usize, is_timed: bool) -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: on success the shim writes the address of an event that is freed on drop alone.
        check(unsafe { bellora_event_record(device_index as c_int, is_timed, &mut event) })?;
        Ok(Self(event))
    }

    /// Seconds from this mark to a later one; both are timed, and the device is past them.
    pub(super) fn seconds_until(&self, later: &Self) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events live through the call; the number is written on success.
        check(unsafe { bellora_event_elapsed(self.0, later.0, &mut milliseconds) })?;
        Ok(milliseconds / 1e3)
    }

    pub(super) fn wait(&self) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_buffer_is_written_again_only_when_its_copy_is_over() {
        let buffers = [(); 2].map(|()| Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        let to = Tensor::zeros([2, 9], (Kind::Float, Device::Cpu));
        let (log, n_marks) = (RefCell::new(Vec::new()), RefCell::new(0));
        let fill = |part: &Tensor, first: usize| {
            log.borrow_mut().push(format!("fill {first}"));
            let end = first as i64 + part.size()[0];
            part.shallow_clone().copy_(&Tensor::arange_start(first as i64, end, (Kind::Float, Device::Cpu)));
            Ok(())
        };
        let mark = || {
            *n_marks.borrow_mut() += 1;
            Ok(*n_marks.borrow())
        };
        let wait = |mark| {
            log.borrow_mut().push(format!("wait {mark}"));
            Ok(())
        };
        in_turn(&to, &buffers, fill, mark, wait).unwrap();
        assert_eq!(to.view([18]), Tensor::arange(18, (Kind::Float, Device::Cpu)));
        let by_turns = ["fill 0", "fill 4", "wait 1", "fill 8", "wait 2", "fill 12", "wait 3", "fill 16"];
        assert_eq!(*log.borrow(), by_turns);
    }

    #[test]
    fn what_cannot_be_filled_is_an_error_and_nothing_follows() {
        let two = TwoBuffers::new(4, Kind::Float, Device::Cpu).unwrap();
        let to = Tensor::zeros([9], (Kind::Float, Device::Cpu));
        let mut n_filled = 0;
        let outcome = two.fill(&to, |_, first| {
            n_filled += 1;
            if first == 4 { Err(crate::error::Error::failed("the file", "is shorter")) } else { Ok(()) }
        });
        assert!(outcome.unwrap_err().to_string().contains("is shorter"));
        assert_eq!(n_filled, 2);
    }
}
