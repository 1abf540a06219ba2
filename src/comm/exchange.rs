//! How one collective operation is carried out over the connections to all other ranks.
//!
//! The tensor is cut into parts, one a rank (empty ones too). Every operation is one or both of two movements: in the first,
//! every rank sends each part to the rank that owns it, which adds the parts up in rank order; in the second, every rank
//! sends its own part to all others. all_reduce is both, over nearly equal parts; reduce_scatter the first;
//! all_gather the second; broadcast the second, with the root's part being the whole; a barrier has nothing to move.
//! Before anything else, every rank announces the operation to every other: ranks that disagree find it out there.
//!
//! Sending and receiving go on at the same time on all connections, piece by piece, so nothing is waited for that waits
//! itself. A summed piece goes out while later ones still come in: the owner has heard it from everybody by then, so what
//! it overwrites elsewhere has been sent.

use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use tch::Tensor;

use super::frame::{Dtype, OpKind, Operation, PIECE, Tag};
use super::link::Link;
use super::sockets::{is_out_of_reach, shown, wait_ready};
use crate::torch;

/// How often an operation that waits looks whether this rank wants to leave.
const LOOK: Duration = Duration::from_millis(100);

/// The connections of a rank and what its operations need besides.
#[derive(Debug)]
pub(super) struct Team {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    /// To all other ranks, in their order.
    pub(super) links: Vec<Link>,
    /// How long an operation may stand still.
    pub(super) timeout: Duration,
    pub(super) is_leaving: Arc<AtomicBool>,
    pub(super) sent_bytes: Arc<AtomicU64>,
}

/// Why an operation failed, and who was the first to say so.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) what: String,
    pub(super) hint: &'static str,
    /// For the other ranks: who found it, and the words.
    pub(super) origin: (usize, String),
}

const SEE_OTHER: &str = "see that rank's own log for the reason; the newest checkpoint is where to go on from";
const SEE_NETWORK: &str = "see that the machine runs and that the network leads there; then go on from the newest checkpoint, \
                           by `bellora resume` or --resume with the same options on every machine";

/// What remains to be done with one other rank.
#[derive(Debug)]
struct Lane {
    is_announced: bool,
    /// Bytes of the tensor that are still to be sent there: of the part that it owns, then of ours.
    to_add: Range<usize>,
    to_keep: Range<usize>,
    has_announced: bool,
    /// Bytes that are still to come from there: of our part, to be added, then of theirs.
    from_add: Range<usize>,
    from_keep: Range<usize>,
    /// The link's payload is a piece that waits for those of the other ranks.
    has_piece: bool,
}

impl Lane {
    fn wants_frame(&self) -> bool {
        !self.has_piece && (!self.has_announced || !self.from_add.is_empty() || !self.from_keep.is_empty())
    }

    fn is_done(&self) -> bool {
        self.is_announced && self.to_add.is_empty() && self.to_keep.is_empty() && !self.has_piece && !self.wants_frame()
    }
}

struct Exchange<'a> {
    team: &'a mut Team,
    operation: Operation,
    tensor: Option<&'a Tensor>,
    lanes: Vec<Lane>,
    /// Up to where our part may be sent on.
    added: usize,
    sum: Vec<u8>,
}

/// The part of the tensor that a rank owns in an operation, in bytes.
fn part(operation: &Operation, rank: usize, world_size: usize) -> Range<usize> {
    let size = operation.dtype.size();
    let n_elements = operation.n_bytes as usize / size;
    let border = |rank: usize| (n_elements as u128 * rank as u128 / world_size as u128) as usize * size;
    match operation.kind {
        OpKind::Broadcast if rank == usize::from(operation.root) => 0..operation.n_bytes as usize,
        OpKind::Broadcast | OpKind::Barrier => 0..0,
        OpKind::AllReduce | OpKind::ReduceScatter | OpKind::AllGather => border(rank)..border(rank + 1),
    }
}

/// Carries an operation out; the tensor has at least one element.
pub(super) fn run(team: &mut Team, operation: Operation, tensor: Option<&Tensor>) -> Result<(), Failure> {
    let own = part(&operation, team.rank, team.world_size);
    let adds = matches!(operation.kind, OpKind::AllReduce | OpKind::ReduceScatter);
    let keeps = operation.kind != OpKind::ReduceScatter;
    let only = |is_wanted: bool, range: Range<usize>| if is_wanted { range } else { 0..0 };
    let lane = |link: &Link| {
        let theirs = part(&operation, link.rank, team.world_size);
        Lane {
            is_announced: false,
            to_add: only(adds, theirs.clone()),
            to_keep: only(keeps, own.clone()),
            has_announced: false,
            from_add: only(adds, own.clone()),
            from_keep: only(keeps, theirs),
            has_piece: false,
        }
    };
    let lanes = team.links.iter().map(lane).collect();
    let added = if adds { own.start } else { own.end };
    Exchange { team, operation, tensor, lanes, added, sum: Vec::new() }.run()
}

impl Exchange<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        let mut quiet_since = Instant::now();
        loop {
            let mut n_moved = 0;
            for at in 0..self.lanes.len() {
                self.listen(at, &mut n_moved)?;
            }
            self.add();
            for at in 0..self.lanes.len() {
                self.talk(at, &mut n_moved)?;
            }
            if self.is_done() {
                return Ok(());
            }
            if self.team.is_leaving.load(Ordering::SeqCst) {
                return Err(self.failure("it left before this operation was done".into(), ""));
            }
            if n_moved > 0 {
                quiet_since = Instant::now();
            } else if let Some(failure) = self.cut() {
                return Err(failure);
            } else if quiet_since.elapsed() >= self.team.timeout {
                return Err(self.stands_still());
            }
            self.wait(quiet_since + self.team.timeout)?;
        }
    }

    fn is_done(&self) -> bool {
        self.lanes.iter().all(Lane::is_done) && !self.team.links.iter().any(Link::is_sending)
    }

    fn wait(&self, until: Instant) -> Result<(), Failure> {
        // Only those that something is wanted of: the others would be reported as closed all the time once they are.
        let lanes = self.lanes.iter().zip(&self.team.links);
        let mut fds: Vec<_> = lanes
            .filter_map(|(lane, link)| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, lane.wants_frame());
                flags.set(PollFlags::OUT, link.is_sending() || self.next_piece(lane).is_some());
                (!flags.is_empty()).then(|| link.poll_fd(flags))
            })
            .collect();
        wait_ready(&mut fds, until.min(Instant::now() + LOOK))
            .map_err(|error| self.failure(format!("the connections cannot be waited for: {error}"), ""))
    }

    /// Takes in at most one frame of another rank, so that none of them holds up the others.
    fn listen(&mut self, at: usize, n_moved: &mut usize) -> Result<(), Failure> {
        if !self.lanes[at].wants_frame() {
            return Ok(());
        }
        match self.team.links[at].receive(n_moved) {
            Ok(None) => Ok(()),
            Ok(Some((tag, operation))) => self.take(at, tag, operation),
            Err(error) => Err(self.lost(at, &error)),
        }
    }

    fn take(&mut self, at: usize, tag: Tag, operation: Operation) -> Result<(), Failure> {
        if let Some(end) = self.end_of_talk(at, tag, operation) {
            return Err(end);
        }
        let (link, lane) = (&self.team.links[at], &mut self.lanes[at]);
        let payload = link.payload();
        let len = payload.len();
        let fits = match lane {
            Lane { has_announced: false, .. } => len == 0,
            Lane { from_add, .. } if !Range::is_empty(from_add) => len == from_add.len().min(PIECE),
            Lane { from_keep, .. } => len > 0 && len <= from_keep.len(),
        };
        if operation != self.operation || !fits {
            let (rank, other) = (self.team.rank, link.rank);
            let what = match operation == self.operation {
                false => format!(
                    "the ranks disagree about what comes now: rank {rank} is at {}, rank {other} at {operation}",
                    self.operation
                ),
                true => format!("rank {other} sent a piece of {len} bytes, which does not fit"),
            };
            let hint = "every rank must issue the same operations in the same order: this is a defect of bellora, or the ranks \
                        run different builds or configs";
            return Err(self.failure(what, hint));
        }
        if !lane.has_announced {
            lane.has_announced = true;
        } else if !lane.from_add.is_empty() {
            lane.has_piece = true;
        } else if let Some(tensor) = self.tensor {
            torch::write_bytes(tensor, lane.from_keep.start, payload);
            lane.from_keep.start += len;
        }
        Ok(())
    }

    /// Adds a piece of our part up in rank order once everybody's has come.
    fn add(&mut self) {
        let Some(tensor) = self.tensor else { return };
        if self.lanes.is_empty() || !self.lanes.iter().all(|lane| lane.has_piece) {
            return;
        }
        let len = self.lanes[0].from_add.len().min(PIECE);
        let range = self.added..self.added + len;
        let mut sum = std::mem::take(&mut self.sum);
        sum.clear();
        for rank in 0..self.team.world_size {
            let piece = match self.team.links.iter().find(|link| link.rank == rank) {
                Some(link) => link.payload(),
                None => &torch::bytes(tensor)[range.clone()],
            };
            match (sum.is_empty(), self.operation.dtype) {
                (true, _) => sum.extend_from_slice(piece),
                (false, Dtype::Fp64) => add_fp64(&mut sum, piece),
                (false, _) => add_fp32(&mut sum, piece),
            }
        }
        torch::write_bytes(tensor, range.start, &sum);
        (self.sum, self.added) = (sum, range.end);
        for lane in &mut self.lanes {
            lane.has_piece = false;
            lane.from_add.start += len;
        }
    }

    /// What can be sent next; the announcement comes first, and is empty.
    fn next_piece(&self, lane: &Lane) -> Option<Range<usize>> {
        let first = |range: Range<usize>| range.start..range.end.min(range.start + PIECE);
        if !lane.is_announced {
            return Some(0..0);
        }
        // Nothing else goes to a rank that is not there yet: its connection stays free for a farewell.
        if !lane.has_announced {
            return None;
        }
        if !lane.to_add.is_empty() {
            return Some(first(lane.to_add.clone()));
        }
        let ready = lane.to_keep.start..lane.to_keep.end.min(self.added);
        (!ready.is_empty()).then(|| first(ready))
    }

    /// Sends at most one frame to another rank.
    fn talk(&mut self, at: usize, n_moved: &mut usize) -> Result<(), Failure> {
        if !self.team.links[at].is_sending()
            && let Some(piece) = self.next_piece(&self.lanes[at])
        {
            let lane = &mut self.lanes[at];
            let remaining = match lane {
                Lane { is_announced: false, .. } => None,
                Lane { to_add, .. } if !Range::is_empty(to_add) => Some(to_add),
                Lane { to_keep, .. } => Some(to_keep),
            };
            match remaining {
                None => lane.is_announced = true,
                Some(remaining) => remaining.start = piece.end,
            }
            self.team.links[at].begin(&self.operation, piece);
        }
        let memory = self.tensor.map_or(&[][..], torch::bytes);
        let mut n_sent = 0;
        let sent = self.team.links[at].send(memory, &mut n_sent);
        self.team.sent_bytes.fetch_add(n_sent as u64, Ordering::Relaxed);
        *n_moved += n_sent;
        let Err(error) = sent else { return Ok(()) };
        // Whoever closed the connection may have said why.
        while let Ok(Some((tag, operation))) = self.team.links[at].receive(&mut n_sent) {
            if let Some(end) = self.end_of_talk(at, tag, operation) {
                return Err(end);
            }
        }
        Err(self.lost(at, &error))
    }

    /// What a rank says that takes no further part.
    fn end_of_talk(&self, at: usize, tag: Tag, operation: Operation) -> Option<Failure> {
        let link = &self.team.links[at];
        match tag {
            Tag::Piece => None,
            Tag::Farewell => {
                let (origin, words) = link.payload().split_first_chunk::<4>()?;
                let (origin, words) =
                    (u32::from_le_bytes(*origin) as usize, String::from_utf8_lossy(words).into_owned());
                let what = format!("rank {origin} gave up: {words}");
                Some(Failure { what, hint: SEE_OTHER, origin: (origin, words) })
            }
            Tag::Leave => {
                let after = match operation.number {
                    0 => "before any operation".to_string(),
                    _ => format!("after {operation}"),
                };
                Some(self.failure(format!("rank {} has left the job {after}", link.rank), SEE_OTHER))
            }
        }
    }

    /// A rank whose machine is out of reach. The others find it out by themselves, or through this one.
    fn cut(&mut self) -> Option<Failure> {
        let (at, error) = self.team.links.iter_mut().enumerate().find_map(|(at, link)| Some((at, link.cut()?)))?;
        Some(self.out_of_reach(at, &error))
    }

    fn out_of_reach(&self, at: usize, error: &std::io::Error) -> Failure {
        let link = &self.team.links[at];
        let (rank, address, last_seen) = (link.rank, link.address, self.last_seen(link));
        let what =
            format!("the machine of rank {rank} at {address}, or the link to it, is gone ({error}); {last_seen}");
        self.failure(what, SEE_NETWORK)
    }

    fn lost(&self, at: usize, error: &std::io::Error) -> Failure {
        if is_out_of_reach(error) {
            return self.out_of_reach(at, error);
        }
        let link = &self.team.links[at];
        let how = match error.kind() {
            ErrorKind::InvalidData => "sent what no rank sends".to_string(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                "closed its connection without a word: its process died or was killed".to_string()
            }
            _ => format!("cannot be reached any more: {error}"),
        };
        self.failure(format!("rank {} {how}; {}", link.rank, self.last_seen(link)), SEE_OTHER)
    }

    fn stands_still(&self) -> Failure {
        let lanes = || self.lanes.iter().zip(&self.team.links);
        let silent: Vec<&Link> = lanes().filter(|(lane, _)| lane.wants_frame()).map(|(_, link)| link).collect();
        let (who, how) = match silent.is_empty() {
            false => (silent, "did not answer"),
            true => (
                lanes().filter(|(_, link)| link.is_sending()).map(|(_, l)| l).collect(),
                "did not take what is sent to it",
            ),
        };
        let who: Vec<String> =
            who.iter().map(|link| format!("rank {} {how} ({})", link.rank, self.last_seen(link))).collect();
        let what = format!("nothing has moved for {}: {}", shown(self.team.timeout), who.join("; "));
        let hint = "see whether that rank hangs, is stopped or cut off, or is merely slower than the timeout allows";
        self.failure(what, hint)
    }

    fn last_seen(&self, link: &Link) -> String {
        match link.last_seen {
            None => "it was not heard of since all met".into(),
            Some(operation) if operation.number == self.operation.number => "it had begun this operation".into(),
            Some(operation) => format!("it was last seen in {operation}"),
        }
    }

    fn failure(&self, what: String, hint: &'static str) -> Failure {
        let words = format!("{}: {what}", self.operation);
        Failure { what, hint, origin: (self.team.rank, words) }
    }
}

fn add_fp32(sum: &mut [u8], piece: &[u8]) {
    for (sum, x) in sum.as_chunks_mut::<4>().0.iter_mut().zip(piece.as_chunks::<4>().0) {
        *sum = (f32::from_le_bytes(*sum) + f32::from_le_bytes(*x)).to_le_bytes();
    }
}

fn add_fp64(sum: &mut [u8], piece: &[u8]) {
    for (sum, x) in sum.as_chunks_mut::<8>().0.iter_mut().zip(piece.as_chunks::<8>().0) {
        *sum = (f64::from_le_bytes(*sum) + f64::from_le_bytes(*x)).to_le_bytes();
    }
}
