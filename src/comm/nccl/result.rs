//! NCCL and the CUDA runtime with their errors as results, in the libraries' own words.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use tch::Kind;

use super::sys::{self, Comm, Config, Event, IN_PROGRESS, NOT_READY, SUCCESS, Stream, UniqueId};
use crate::error::{Error, Result};

/// The opened libraries.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) nccl: sys::Nccl,
    cuda: sys::Cuda,
}

/// How a call on a communicator that does not block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    Pending,
}

/// NCCL's number of a dtype.
pub(super) fn dtype(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Uint8 => Some(1),
        Kind::Int64 => Some(4),
        Kind::Float => Some(7),
        Kind::Double => Some(8),
        _ => None,
    }
}

/// Opens the libraries once.
///
/// # Errors
/// No NCCL, or none that serves; no CUDA runtime.
pub(super) fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
    let opened = LIBRARY.get_or_init(|| Ok(Library { nccl: sys::Nccl::open()?, cuda: sys::Cuda::find()? }));
    opened.as_ref().map_err(|said| {
        Error::failed("NCCL", format!("several GPUs need it, and it cannot be used: {said}")).hint(
            "install NCCL 2.14 or newer (it comes with torch from pip as nvidia-nccl, elsewhere as libnccl2), and set \
             LD_LIBRARY_PATH to the folder of libnccl.so.2",
        )
    })
}

/// A text of a C library, which it keeps.
fn text(text: *const c_char) -> String {
    if text.is_null() {
        return "no message".into();
    }
    // SAFETY: both libraries give NUL-terminated texts that stay at least until the next call of this thread.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string()
}

impl Library {
    /// Reads the code of an NCCL call.
    pub(super) fn check(&self, call: &str, code: c_int, comm: Comm) -> Result<Progress> {
        match code {
            SUCCESS => return Ok(Progress::Done),
            IN_PROGRESS => return Ok(Progress::Pending),
            _ => {}
        }
        // SAFETY: both take any code, and any communicator or null.
        let (what, detail) = unsafe { (text((self.nccl.error_string)(code)), text((self.nccl.last_error)(comm))) };
        let hint = match code {
            1 => "see the GPU's state with nvidia-smi, and NCCL's own account with NCCL_DEBUG=INFO",
            2 => {
                "see NCCL's own account with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME names the network interface, and containers \
                 need enough /dev/shm"
            }
            4 | 5 => "give every process a GPU of its own (CUDA_VISIBLE_DEVICES); NCCL_DEBUG=INFO says more",
            6 => {
                "another rank died or the network failed: see the other ranks' logs, and go on from the newest checkpoint"
            }
            _ => "see NCCL's own account with NCCL_DEBUG=INFO",
        };
        Err(Error::failed(format!("NCCL's {call}"), format!("{what}: {detail}")).hint(hint))
    }

    /// How a communicator stands, asynchronous errors included.
    pub(super) fn progress(&self, comm: Comm) -> Result<Progress> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive; the call writes one number.
        let code = unsafe { (self.nccl.get_async_error)(comm, &mut state) };
        self.check("ncclCommGetAsyncError", code, comm)?;
        self.check("operation", state, comm)
    }

    pub(super) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes one id.
        let code = unsafe { (self.nccl.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", code, std::ptr::null_mut()).map(|_| id)
    }

    /// Begins to make a communicator.
    pub(super) fn init_rank(&self, world_size: usize, id: UniqueId, rank: usize) -> Result<Comm> {
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::without_blocking());
        // SAFETY: it writes the communicator's address; the config is read before the call returns.
        let code = unsafe { (self.nccl.init_rank)(&mut comm, world_size as c_int, id, rank as c_int, &mut config) };
        self.check("ncclCommInitRankConfig", code, comm).map(|_| comm)
    }

    fn check_cuda(&self, call: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: it takes any code.
        let said = text(unsafe { (self.cuda.error_string)(code) });
        Err(Error::failed(format!("CUDA's {call}"), format!("{said} (error {code})"))
            .hint("see the GPU's state with nvidia-smi"))
    }

    /// Makes a device the one that this thread's calls are for.
    pub(super) fn set_device(&self, index: usize) -> Result<()> {
        // SAFETY: it takes any number.
        self.check_cuda("cudaSetDevice", unsafe { (self.cuda.set_device)(index as c_int) })
    }

    pub(super) fn new_stream(&self) -> Result<Stream> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: it writes the stream's address.
        let code = unsafe { (self.cuda.stream_create)(&mut stream, sys::STREAM_NON_BLOCKING) };
        self.check_cuda("cudaStreamCreateWithFlags", code).map(|()| stream)
    }

    pub(super) fn new_event(&self) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: it writes the event's address.
        let code = unsafe { (self.cuda.event_create)(&mut event, sys::EVENT_WITHOUT_TIMING) };
        self.check_cuda("cudaEventCreateWithFlags", code).map(|()| event)
    }

    /// Marks the end of what is queued in a stream.
    pub(super) fn record(&self, event: Event, stream: Stream) -> Result<()> {
        // SAFETY: both were made by this library's calls and live; the null stream is torch's.
        self.check_cuda("cudaEventRecord", unsafe { (self.cuda.event_record)(event, stream) })
    }

    /// Has what is queued in a stream from now on wait for an event.
    pub(super) fn wait_for(&self, stream: Stream, event: Event) -> Result<()> {
        // SAFETY: as in `record`.
        self.check_cuda("cudaStreamWaitEvent", unsafe { (self.cuda.stream_wait_event)(stream, event, 0) })
    }

    /// Whether an event has been reached.
    pub(super) fn has_come(&self, event: Event) -> Result<bool> {
        // SAFETY: as in `record`.
        match unsafe { (self.cuda.event_query)(event) } {
            NOT_READY => Ok(false),
            code => self.check_cuda("cudaEventQuery", code).map(|()| true),
        }
    }

    /// Frees what belongs to a communicator; nothing is done about errors, since all of it ends.
    pub(super) fn free(&self, stream: Stream, events: [Event; 2]) {
        // SAFETY: made by this library's calls; nobody uses them afterwards.
        unsafe {
            for event in events.into_iter().filter(|event| !event.is_null()) {
                (self.cuda.event_destroy)(event);
            }
            if !stream.is_null() {
                (self.cuda.stream_destroy)(stream);
            }
        }
    }
}
