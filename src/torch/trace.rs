//! libtorch's profiler: the kernels that a GPU ran, or the ops that a CPU did, with their times.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Device;

use super::check;
use crate::error::Result;

type Each = unsafe extern "C" fn(*mut c_void, *const c_char, u64, i64, i64);

unsafe extern "C" {
    fn bellora_trace_begin(is_cuda: bool) -> c_int;
    fn bellora_trace_end(is_cuda: bool, each: Option<Each>, to: *mut c_void) -> c_int;
}

/// Something that ran: a kernel or a copy on a GPU, an op of libtorch's on a CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// As libtorch or CUDA names it.
    pub name: String,
    /// The GPU's stream, or the thread.
    pub lane: u64,
    /// Nanoseconds after the recording began.
    pub start_ns: i64,
    /// Nanoseconds that it took, what it called included.
    pub duration_ns: i64,
}

/// A recording that is under way. Dropped, it ends, and what it holds is lost.
#[derive(Debug)]
pub struct Recording {
    is_cuda: bool,
    has_ended: bool,
}

impl Recording {
    /// Begins to record what this thread has a device do. There is one recording at a time.
    ///
    /// # Errors
    /// A libtorch whose profiler cannot be used here, or is in use.
    pub fn begin(device: Device) -> Result<Self> {
        let is_cuda = device.is_cuda();
        // SAFETY: it takes a number.
        check(unsafe { bellora_trace_begin(is_cuda) })?;
        Ok(Self { is_cuda, has_ended: false })
    }

    /// Ends it and gives what ran, in the order of libtorch's report. Work that is still queued on a GPU is not waited for.
    ///
    /// # Errors
    /// A profiler that fails.
    pub fn end(mut self) -> Result<Vec<Event>> {
        let mut events: Vec<Event> = Vec::new();
        self.has_ended = true;
        // SAFETY: the shim calls `push` with `to` before it returns, and with nothing else.
        check(unsafe { bellora_trace_end(self.is_cuda, Some(push), (&raw mut events).cast()) })?;
        Ok(events)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if !self.has_ended {
            // SAFETY: nothing is called back. A profiler that fails to end is left as it is.
            unsafe { bellora_trace_end(self.is_cuda, None, std::ptr::null_mut()) };
        }
    }
}

/// # Safety
/// `to` is the list of events and nobody else uses it; `name` is NUL-terminated.
unsafe extern "C" fn push(to: *mut c_void, name: *const c_char, lane: u64, start_ns: i64, duration_ns: i64) {
    // SAFETY: as the caller vouches.
    let (events, name) = unsafe { (&mut *to.cast::<Vec<Event>>(), CStr::from_ptr(name)) };
    events.push(Event { name: name.to_string_lossy().into_owned(), lane, start_ns, duration_ns });
}
