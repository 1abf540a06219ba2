//! Collectives over plain TCP, for processes on CPUs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::{Device, Tensor};

use super::communicator::{Communicator, check_root};
use super::exchange::{Failure, Team, run};
use super::frame::{Dtype, OpKind, Operation};
use super::link::{Farewell, Link};
use super::place::Place;
use super::rendezvous::{Rendezvous, join};
use crate::error::{Error, Fault, Result};
use crate::torch;

/// How long a rank that gives up stays to tell the others why.
const FAREWELL: Duration = Duration::from_secs(1);

/// A connection to every other rank, and a thread that carries the queued operations out.
///
/// Dropping it leaves the job: who still waits for this rank is told. Its memory is a piece (256 KiB) a rank.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    world_size: usize,
    jobs: Option<Sender<QueuedOperation>>,
    ends: Receiver<std::result::Result<(), Fault>>,
    n_queued: usize,
    n_issued: u64,
    failed: Option<Fault>,
    worker: Option<JoinHandle<()>>,
    is_leaving: Arc<AtomicBool>,
    sent_bytes: Arc<AtomicU64>,
}

/// A queued operation; without a tensor where there is nothing in it.
type QueuedOperation = (Operation, Option<Tensor>);

impl Tcp {
    /// Joins the job whose launcher, or rank 0, listens at the address of the place.
    ///
    /// # Errors
    /// Whatever keeps the ranks from meeting: nobody listens there, missing or duplicate ranks, another world size, another
    /// token; within the deadline of the place.
    pub fn join(place: &Place) -> Result<Self> {
        let mesh = join(place)?;
        let (is_leaving, sent_bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let team = Team {
            rank: place.rank,
            world_size: place.world_size,
            links: mesh.into_iter().map(|(rank, stream)| Link::new(rank, stream)).collect(),
            timeout: place.timeout,
            is_leaving: Arc::clone(&is_leaving),
            sent_bytes: Arc::clone(&sent_bytes),
        };
        let (jobs, queue) = channel();
        let (done, ends) = channel();
        let worker = std::thread::Builder::new().name("collectives".into()).spawn(move || work(team, &queue, &done));
        let worker = worker.map_err(|e| Error::failed("the collectives", format!("no thread for them: {e}")))?;
        Ok(Self {
            rank: place.rank,
            world_size: place.world_size,
            jobs: Some(jobs),
            ends,
            n_queued: 0,
            n_issued: 0,
            failed: None,
            worker: Some(worker),
            is_leaving,
            sent_bytes,
        })
    }

    /// Joins a job that has no launcher, as its rank 0: listens itself, on its own interface and the port of the address.
    ///
    /// # Errors
    /// As [`Tcp::join`]; a port that is in use.
    pub fn lead(place: &Place) -> Result<Self> {
        let port = place.address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        let Some(port) = port.filter(|port| *port != 0) else {
            return Err(Error::invalid("the rendezvous", format!("{:?} names no port", place.address))
                .hint("write host:port, with a free port of rank 0's machine"));
        };
        let at = SocketAddr::new(place.interface, port);
        let rendezvous =
            Rendezvous::listen_at(at, place.world_size, &place.token, place.deadline, Arc::clone(&place.came))?;
        let joined = Self::join(place)?;
        rendezvous.finish()?;
        Ok(joined)
    }

    fn queue(&mut self, kind: OpKind, tensor: Option<&Tensor>, root: usize) -> Result<()> {
        self.collect()?;
        let (dtype, n_bytes) = match tensor {
            None => (Dtype::None, 0),
            Some(tensor) => self.check(kind, tensor)?,
        };
        self.n_issued += 1;
        // A root above 65,535 was refused as no rank: connections to so many do not exist.
        let operation = Operation { number: self.n_issued, kind, dtype, root: root as u16, n_bytes };
        let tensor = tensor.filter(|tensor| tensor.numel() > 0).map(Tensor::shallow_clone);
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send((operation, tensor)).is_err()) {
            // The thread has ended: why, is the last that it said.
            return self.wait().and(Err(Error::failed(self.place(), "the thread of the collectives has ended")));
        }
        self.n_queued += 1;
        Ok(())
    }

    fn check(&self, kind: OpKind, tensor: &Tensor) -> Result<(Dtype, u64)> {
        let wrong = |what: String| Err(Error::failed(format!("{}: {kind}", self.place()), what));
        if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
            return wrong(format!("takes contiguous tensors of a CPU, not one on {:?}", tensor.device()));
        }
        let allowed = Dtype::of(tensor.kind()).filter(|dtype| dtype.is_float() || !kind.adds());
        let Some(dtype) = allowed else { return wrong(format!("does not take tensors of {:?}", tensor.kind())) };
        let is_in_parts = matches!(kind, OpKind::ReduceScatter | OpKind::AllGather);
        if is_in_parts && !tensor.numel().is_multiple_of(self.world_size) {
            let (n, world_size) = (tensor.numel(), self.world_size);
            return wrong(format!("{n} elements are not {world_size} equal parts, one a rank"));
        }
        Ok((dtype, (tensor.numel() * dtype.size()) as u64))
    }

    fn place(&self) -> String {
        format!("rank {} of {}", self.rank, self.world_size)
    }

    /// Takes note of what is done, without waiting.
    fn collect(&mut self) -> Result<()> {
        while let Ok(end) = self.ends.try_recv() {
            self.note(end);
        }
        self.state()
    }

    fn note(&mut self, end: std::result::Result<(), Fault>) {
        self.n_queued = self.n_queued.saturating_sub(1);
        if let Err(fault) = end {
            self.failed.get_or_insert(fault);
        }
    }

    fn state(&self) -> Result<()> {
        self.failed.as_ref().map_or(Ok(()), |fault| Err(Error::Lost(fault.clone())))
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn all_reduce(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::AllReduce, Some(tensor), 0)
    }

    fn reduce_scatter(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::ReduceScatter, Some(tensor), 0)
    }

    fn all_gather(&mut self, tensor: &Tensor) -> Result<()> {
        self.queue(OpKind::AllGather, Some(tensor), 0)
    }

    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<()> {
        check_root(root, self.world_size)?;
        self.queue(OpKind::Broadcast, Some(tensor), root)
    }

    fn wait(&mut self) -> Result<()> {
        self.collect()?;
        while self.n_queued > 0 {
            let gone = || Err(Fault::new(self.place(), "the thread of the collectives ended in a panic"));
            let end = self.ends.recv().unwrap_or_else(|_| gone());
            self.note(end);
            self.state()?;
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.queue(OpKind::Barrier, None, 0)?;
        self.wait()
    }

    fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // What is queued and not waited for is given up; a queue that is done is left in good order.
        self.is_leaving.store(true, Ordering::SeqCst);
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// The worker: carries operations out in the order of their calls until one fails or the queue is closed.
fn work(mut team: Team, queue: &Receiver<QueuedOperation>, done: &Sender<std::result::Result<(), Fault>>) {
    let mut last = Operation { number: 0, kind: OpKind::Barrier, dtype: Dtype::None, root: 0, n_bytes: 0 };
    for (operation, tensor) in queue {
        if let Err(failure) = run(&mut team, operation, tensor.as_ref()) {
            let Failure { what, hint, origin: (origin, words) } = failure;
            let place = format!("rank {} of {}, {operation}", team.rank, team.world_size);
            let words: Vec<u8> = (origin as u32).to_le_bytes().into_iter().chain(words.into_bytes()).collect();
            let memory = tensor.as_ref().map_or(&[][..], torch::bytes);
            let farewell = Farewell::new(team.links, &operation, memory, &words);
            // The other thread may do with the tensor what it likes from here on, and need not wait for the farewell.
            let _ = done.send(Err(Fault::new(place, what).hint(hint)));
            farewell.say(FAREWELL);
            return;
        }
        last = operation;
        if done.send(Ok(())).is_err() {
            break;
        }
    }
    team.links.iter_mut().for_each(|link| link.leave(&last));
}
