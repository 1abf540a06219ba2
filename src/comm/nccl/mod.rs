//! Collectives between GPUs by NCCL, whose library is opened at run time.
//!
//! Operations go into a stream of their own, behind what torch has queued so far; `wait` waits on the host, since only there
//! can a rank that hangs be told from one at work. The ranks meet over [`Tcp`], which carries NCCL's unique id to them.
#![expect(unsafe_code, reason = "calls of a C library")]

mod result;
mod sys;

use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use self::result::{Library, Progress, dtype, library};
use self::sys::{Comm, Event, SUM, Stream, UniqueId};
use super::communicator::{Communicator, check_root};
use super::frame::OpKind;
use super::sockets::shown;
use super::tcp::Tcp;
use crate::error::{Error, Fault, Result};

/// The pause between two looks at what a GPU is at.
const LOOK: Duration = Duration::from_micros(50);
/// How long the ranks may take to close a communicator together.
const CLOSING: Duration = Duration::from_secs(5);

/// A rank of a job on GPUs.
#[derive(Debug)]
pub struct Nccl {
    tcp: Tcp,
    library: &'static Library,
    device: Device,
    comm: Comm,
    stream: Stream,
    /// The end of torch's work before an operation, and of the last operation.
    events: [Event; 2],
    timeout: Duration,
    n_issued: u64,
    /// Tensors of operations that may not be done: their memory must not be given to others.
    held: Vec<Tensor>,
    sent_bytes: u64,
    failed: Option<Fault>,
}

// SAFETY: NCCL's communicators, streams and events may be used from any thread, one at a time, which `&mut` ensures; each
// call sets the thread's device first.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Makes a communicator of the ranks that have met; `timeout` is for that and for every wait.
    ///
    /// # Errors
    /// No usable NCCL; what NCCL says of the GPUs or the network; ranks that do not come.
    pub fn new(mut tcp: Tcp, device: Device, timeout: Duration) -> Result<Self> {
        let library = library()?;
        let id = match tcp.rank() {
            0 => library.unique_id()?,
            _ => UniqueId([0; 128]),
        };
        let shared = Tensor::f_from_slice(&id.0)?;
        tcp.broadcast(&shared, 0)?;
        tcp.wait()?;
        let mut id = UniqueId([0; 128]);
        id.0.copy_from_slice(crate::torch::bytes(&shared));
        let null = std::ptr::null_mut();
        let (n_issued, held, sent_bytes, failed) = (0, Vec::new(), 0, None);
        // Whole from the start, so that dropping it frees what was made when a later call fails.
        let (stream, events) = (null, [null; 2]);
        let mut nccl =
            Self { tcp, library, device, comm: null, stream, events, timeout, n_issued, held, sent_bytes, failed };
        nccl.set_device()?;
        nccl.stream = library.new_stream()?;
        nccl.events = [library.new_event()?, library.new_event()?];
        nccl.comm = library.init_rank(nccl.world_size(), id, nccl.rank())?;
        nccl.settle(nccl.timeout, "the communicator's beginning").inspect_err(|_| nccl.abort())?;
        Ok(nccl)
    }

    fn set_device(&self) -> Result<()> {
        match self.device {
            Device::Cuda(index) => self.library.set_device(index),
            _ => Ok(()),
        }
    }

    /// Waits until the communicator takes calls again.
    fn settle(&self, timeout: Duration, what: &str) -> Result<()> {
        let begun = Instant::now();
        while self.library.progress(self.comm)? == Progress::Pending {
            if begun.elapsed() >= timeout {
                return Err(self.too_late(timeout, what));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn too_late(&self, timeout: Duration, what: &str) -> Error {
        let place = format!("rank {} of {}, {what}", self.rank(), self.world_size());
        let what = format!("is not done after {}: another rank hangs, died, or is cut off", shown(timeout));
        Error::Lost(Fault::new(place, what).hint("see the other ranks' logs; NCCL_DEBUG=INFO gives NCCL's own account"))
    }

    /// Ends everything at once. The other ranks learn of it by the connections that close with this process.
    fn abort(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: the communicator is alive and is not used again.
            unsafe { (self.library.nccl.abort)(self.comm) };
            self.comm = std::ptr::null_mut();
        }
    }

    fn state(&self) -> Result<()> {
        self.failed.as_ref().map_or(Ok(()), |fault| Err(Error::Lost(fault.clone())))
    }

    /// Keeps the first error for all later calls, with where it happened; nothing works after it.
    fn keep(&mut self, result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        let place = format!("rank {} of {}, {}", self.rank(), self.world_size(), self.last());
        let fault = match error.faults().first() {
            Some(fault) if fault.place.starts_with("rank ") => fault.clone(),
            Some(fault) => Fault::new(place, fault.to_string()).hint(&fault.hint),
            None => Fault::new(place, error.to_string()).hint(error.advice()),
        };
        self.failed = Some(fault);
        self.abort();
        self.state()
    }

    fn last(&self) -> String {
        format!("operation {}", self.n_issued)
    }

    /// Queues an operation behind torch's work; `call` gets the tensor's memory, the part of this rank, elements (of a part,
    /// where the tensor is in parts) and the dtype.
    fn queue(
        &mut self,
        kind: OpKind,
        tensor: &Tensor,
        call: impl FnOnce(&Self, *mut c_void, *mut c_void, usize, c_int) -> c_int,
    ) -> Result<()> {
        self.state()?;
        let wrong = |what: String| Err(Error::failed(kind.to_string(), what));
        if tensor.device() != self.device || !tensor.is_contiguous() {
            return wrong(format!("takes contiguous tensors on {:?}, not one on {:?}", self.device, tensor.device()));
        }
        let is_allowed = !kind.adds() || matches!(tensor.kind(), Kind::Float | Kind::Double);
        let Some(dtype) = dtype(tensor.kind()).filter(|_| is_allowed) else {
            return wrong(format!("does not take tensors of {:?}", tensor.kind()));
        };
        let (n, world_size) = (tensor.numel(), self.world_size());
        let is_in_parts = matches!(kind, OpKind::ReduceScatter | OpKind::AllGather);
        if is_in_parts && !n.is_multiple_of(world_size) {
            return wrong(format!("{n} elements are not {world_size} equal parts, one a rank"));
        }
        self.n_issued += 1;
        if n == 0 {
            return Ok(());
        }
        let count = if is_in_parts { n / world_size } else { n };
        let size = tensor.kind().elt_size_in_bytes();
        let memory = tensor.data_ptr();
        let own = if is_in_parts { memory.wrapping_byte_add(self.rank() * count * size) } else { memory };
        let queued = self.set_device().and_then(|()| {
            self.library.record(self.events[0], std::ptr::null_mut())?;
            self.library.wait_for(self.stream, self.events[0])?;
            self.library.check(&kind.to_string(), call(self, memory, own, count, dtype), self.comm)?;
            // Until it is over, the operation need not be in the stream yet.
            self.settle(self.timeout, &format!("{} ({kind})", self.last()))
        });
        self.keep(queued)?;
        self.held.push(tensor.shallow_clone());
        let moved = (n * size * (world_size - 1) / world_size) as u64;
        self.sent_bytes += if kind == OpKind::AllReduce { 2 * moved } else { moved };
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.set_device()?;
        self.library.record(self.events[1], self.stream)?;
        let begun = Instant::now();
        while !self.library.has_come(self.events[1])? {
            self.library.progress(self.comm)?;
            if begun.elapsed() >= self.timeout {
                return Err(self.too_late(self.timeout, &format!("the operations up to {}", self.last())));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }

    fn world_size(&self) -> usize {
        self.tcp.world_size()
    }

    fn device(&self) -> Device {
        self.device
    }

    fn all_reduce(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::AllReduce, tensor, |it, memory, _, count, dtype| {
            // SAFETY: the memory is that of a contiguous tensor of so many elements on this device, which is held until the
            // operation is done; communicator and stream are alive.
            unsafe { (it.library.nccl.all_reduce)(memory, memory, count, dtype, SUM, it.comm, it.stream) }
        })
    }

    fn reduce_scatter(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::ReduceScatter, tensor, |it, memory, own, count, dtype| {
            // SAFETY: as in `all_reduce`; the tensor has so many elements for every rank.
            unsafe { (it.library.nccl.reduce_scatter)(memory, own, count, dtype, SUM, it.comm, it.stream) }
        })
    }

    fn all_gather(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::AllGather, tensor, |it, memory, own, count, dtype| {
            // SAFETY: as in `reduce_scatter`.
            unsafe { (it.library.nccl.all_gather)(own, memory, count, dtype, it.comm, it.stream) }
        })
    }

    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<()> {
        check_root(root, self.world_size())?;
        self.queue(OpKind::Broadcast, tensor, |it, memory, _, count, dtype| {
            // SAFETY: as in `all_reduce`.
            unsafe { (it.library.nccl.broadcast)(memory, memory, count, dtype, root as c_int, it.comm, it.stream) }
        })
    }

    fn wait(&mut self) -> Result<()> {
        self.state()?;
        if !self.held.is_empty() {
            let end = self.finish();
            self.keep(end)?;
            self.held.clear();
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.wait()?;
        self.tcp.barrier()
    }

    /// What a ring sends: (W - 1) / W of the tensor in each movement. NCCL may have taken another way.
    fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // What is queued and not waited for is given up.
        if !self.held.is_empty() {
            self.abort();
        }
        if !self.comm.is_null() {
            // SAFETY: the communicator is alive.
            let code = unsafe { (self.library.nccl.finalize)(self.comm) };
            let closed = self.library.check("ncclCommFinalize", code, self.comm);
            match closed.and_then(|_| self.settle(CLOSING, "the communicator's end")) {
                Ok(()) => {
                    // SAFETY: the communicator is alive and is not used again.
                    unsafe { (self.library.nccl.destroy)(self.comm) };
                }
                Err(_) => self.abort(),
            }
        }
        self.library.free(self.stream, self.events);
    }
}
