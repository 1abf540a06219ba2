//! NCCL's C functions, and those of the CUDA runtime that go with them, as they are looked up at run time. Types and numbers
//! are those of nccl.h (2.14 and newer) and cuda_runtime_api.h.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::torch::driver::Library;

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;
/// `cudaStream_t`; null is torch's own stream.
pub(super) type Stream = *mut c_void;
/// `cudaEvent_t`.
pub(super) type Event = *mut c_void;

pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`: a communicator that does not block is still at it.
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclSum`.
pub(super) const SUM: c_int = 0;
/// `cudaErrorNotReady`.
pub(super) const NOT_READY: c_int = 600;
/// `cudaStreamNonBlocking`: not ordered with the default stream but by events.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// `cudaEventDisableTiming`.
pub(super) const EVENT_WITHOUT_TIMING: c_uint = 2;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` as NCCL 2.14 had it; newer ones read as much as the size says and take their own defaults for the rest.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    /// A communicator whose calls return at once, so that deadlines can be kept.
    pub(super) fn without_blocking() -> Self {
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 21_400, blocking: 0 }
    }
}

/// NCCL's functions.
#[derive(Debug)]
pub(super) struct Nccl {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(super) init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub(super) get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub(super) finalize: unsafe extern "C" fn(Comm) -> c_int,
    pub(super) destroy: unsafe extern "C" fn(Comm) -> c_int,
    pub(super) abort: unsafe extern "C" fn(Comm) -> c_int,
    pub(super) error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(super) last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    /// Send buffer, receive buffer, elements, dtype, operation.
    pub(super) all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    /// The same, with the elements that a rank receives.
    pub(super) reduce_scatter:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    /// Send buffer, receive buffer, elements that a rank sends, dtype.
    pub(super) all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int,
    /// Send buffer, receive buffer, elements, dtype, root.
    pub(super) broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
}

/// The CUDA runtime's functions.
#[derive(Debug)]
pub(super) struct Cuda {
    pub(super) set_device: unsafe extern "C" fn(c_int) -> c_int,
    pub(super) stream_create: unsafe extern "C" fn(*mut Stream, c_uint) -> c_int,
    pub(super) stream_destroy: unsafe extern "C" fn(Stream) -> c_int,
    pub(super) stream_wait_event: unsafe extern "C" fn(Stream, Event, c_uint) -> c_int,
    pub(super) event_create: unsafe extern "C" fn(*mut Event, c_uint) -> c_int,
    pub(super) event_destroy: unsafe extern "C" fn(Event) -> c_int,
    pub(super) event_record: unsafe extern "C" fn(Event, Stream) -> c_int,
    pub(super) event_query: unsafe extern "C" fn(Event) -> c_int,
    pub(super) error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nccl {
    /// Opens `libnccl.so.2`; what is missing, if it cannot.
    pub(super) fn open() -> Result<Self, String> {
        let library = Library::open("libnccl.so.2")?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that takes it has the type of this function in nccl.h.
                unsafe { library.function($name) }.ok_or_else(|| format!("libnccl.so.2 has no {:?}", $name))?
            };
        }
        Ok(Self {
            get_unique_id: function!(c"ncclGetUniqueId"),
            init_rank: function!(c"ncclCommInitRankConfig"),
            get_async_error: function!(c"ncclCommGetAsyncError"),
            finalize: function!(c"ncclCommFinalize"),
            destroy: function!(c"ncclCommDestroy"),
            abort: function!(c"ncclCommAbort"),
            error_string: function!(c"ncclGetErrorString"),
            last_error: function!(c"ncclGetLastError"),
            all_reduce: function!(c"ncclAllReduce"),
            reduce_scatter: function!(c"ncclReduceScatter"),
            all_gather: function!(c"ncclAllGather"),
            broadcast: function!(c"ncclBroadcast"),
        })
    }
}

impl Cuda {
    /// Finds the runtime that libtorch's CUDA half has brought into the process.
    pub(super) fn find() -> Result<Self, String> {
        let every = Library::every();
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that takes it has the type of this function in cuda_runtime_api.h.
                unsafe { every.function($name) }
                    .ok_or_else(|| format!("the CUDA runtime is not loaded: there is no {:?}", $name))?
            };
        }
        Ok(Self {
            set_device: function!(c"cudaSetDevice"),
            stream_create: function!(c"cudaStreamCreateWithFlags"),
            stream_destroy: function!(c"cudaStreamDestroy"),
            stream_wait_event: function!(c"cudaStreamWaitEvent"),
            event_create: function!(c"cudaEventCreateWithFlags"),
            event_destroy: function!(c"cudaEventDestroy"),
            event_record: function!(c"cudaEventRecord"),
            event_query: function!(c"cudaEventQuery"),
            error_string: function!(c"cudaGetErrorString"),
        })
    }
}
