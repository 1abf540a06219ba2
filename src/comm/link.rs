//! One rank's connection to another: frames in and out, without ever blocking; and beside it a lifeline.
//!
//! The lifeline is a connection on which nothing is said. The two systems ask each other on it whether they are still there
//! ([`watch`](super::sockets::watch)), which they answer also for a process that is slow or stopped. On the connection of
//! the frames itself that would not be known: a stopped process leaves its buffer full, which the system that sends does not
//! tell from a machine that is gone.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::frame::{HEADER_LEN, Operation, PIECE, Tag, header, read_header};
use super::sockets::{is_out_of_reach, wait_ready, would_block};

/// What two ranks have between them once they have met.
#[derive(Debug)]
pub(super) struct Connection {
    /// Where the other one's machine is reached.
    pub(super) address: IpAddr,
    /// For frames; it does not block.
    pub(super) stream: TcpStream,
    /// Is watched, and carries nothing.
    pub(super) lifeline: TcpStream,
}

/// A connection to another rank.
#[derive(Debug)]
pub(super) struct Link {
    /// The other rank.
    pub(super) rank: usize,
    /// Where its machine is reached.
    pub(super) address: IpAddr,
    /// The operation that the last header from there named.
    pub(super) last_seen: Option<Operation>,
    stream: TcpStream,
    /// Until it has failed.
    lifeline: Option<TcpStream>,
    head: [u8; HEADER_LEN],
    n_head: usize,
    payload: Vec<u8>,
    n_payload: usize,
    out: Option<Outgoing>,
}

/// A frame on its way out.
#[derive(Debug)]
struct Outgoing {
    header: [u8; HEADER_LEN],
    /// Its payload within the tensor of the operation.
    bytes: Range<usize>,
    /// How much of header and payload has gone.
    n_sent: usize,
}

impl Link {
    /// Takes over a connection.
    pub(super) fn new(rank: usize, connection: Connection) -> Self {
        let Connection { address, stream, lifeline } = connection;
        let (lifeline, head, payload) = (Some(lifeline), [0; HEADER_LEN], Vec::new());
        Self { rank, address, last_seen: None, stream, lifeline, head, n_head: 0, payload, n_payload: 0, out: None }
    }

    /// What the system says of the other rank's machine when it is out of reach.
    pub(super) fn cut(&mut self) -> Option<io::Error> {
        // Not by the socket's error: that also tells of a route that is missed for a moment, which the connection outlives.
        let ended = match self.lifeline.as_ref()?.peek(&mut [0]) {
            Err(error) if would_block(&error) || error.kind() == ErrorKind::Interrupted => return None,
            ended => ended.err(),
        };
        // Of a process that died on a machine that lives, the other connection tells.
        self.lifeline = None;
        ended.filter(is_out_of_reach)
    }

    /// Takes in what has come; `None` until a frame is whole. `n_moved` grows by the bytes that came.
    ///
    /// # Errors
    /// The connection is closed, or what comes is no frame (`InvalidData`).
    pub(super) fn receive(&mut self, n_moved: &mut usize) -> io::Result<Option<(Tag, Operation)>> {
        loop {
            if self.n_head == HEADER_LEN {
                let (tag, operation, len) = read_header(&self.head).ok_or(ErrorKind::InvalidData)?;
                self.last_seen = Some(operation);
                self.payload.resize(len, 0);
                if self.n_payload == len {
                    (self.n_head, self.n_payload) = (0, 0);
                    return Ok(Some((tag, operation)));
                }
            }
            let room = match self.n_head {
                HEADER_LEN => &mut self.payload[self.n_payload..],
                n => &mut self.head[n..],
            };
            match self.stream.read(room) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    *n_moved += n;
                    if self.n_head == HEADER_LEN { self.n_payload += n } else { self.n_head += n }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// The payload of the frame that came last.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Whether a frame is still on its way out.
    pub(super) fn is_sending(&self) -> bool {
        self.out.is_some()
    }

    /// Begins a frame with a part of the operation's tensor.
    pub(super) fn begin(&mut self, operation: &Operation, bytes: Range<usize>) {
        self.out = Some(Outgoing { header: header(Tag::Piece, operation, bytes.len()), bytes, n_sent: 0 });
    }

    /// Sends what the connection takes of the frame that was begun. `n_moved` grows by the bytes that went.
    ///
    /// # Errors
    /// The connection is closed.
    pub(super) fn send(&mut self, memory: &[u8], n_moved: &mut usize) -> io::Result<()> {
        while let Some(out) = &mut self.out {
            let header = &out.header[out.n_sent.min(HEADER_LEN)..];
            let payload = &memory[out.bytes.clone()][out.n_sent.saturating_sub(HEADER_LEN)..];
            if header.is_empty() && payload.is_empty() {
                self.out = None;
                break;
            }
            match self.stream.write_vectored(&[IoSlice::new(header), IoSlice::new(payload)]) {
                Ok(n) => {
                    out.n_sent += n;
                    *n_moved += n;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What to wait for.
    pub(super) fn poll_fd(&self, flags: PollFlags) -> PollFd<'_> {
        PollFd::new(&self.stream, flags)
    }

    /// Says that this rank leaves after its last operation was done; the connection is idle, so it has room for that.
    pub(super) fn leave(&mut self, last: &Operation) {
        // Who is not there any more needs no word.
        let _ = self.stream.write_all(&header(Tag::Leave, last, 0));
    }
}

/// The last words of a rank that gives up, to all others.
pub(super) struct Farewell {
    /// The connections with what is still to be sent over them.
    rests: Vec<(Link, Vec<u8>)>,
}

impl Farewell {
    /// Prepares them; a frame that is on its way will be finished first. The memory is not needed afterwards.
    pub(super) fn new(links: Vec<Link>, operation: &Operation, memory: &[u8], words: &[u8]) -> Self {
        let words = &words[..words.len().min(PIECE)];
        let with_rest = |mut link: Link| {
            let mut rest = Vec::new();
            if let Some(Outgoing { header, bytes, n_sent }) = link.out.take().filter(|out| out.n_sent > 0) {
                rest.extend(&header[n_sent.min(HEADER_LEN)..]);
                rest.extend(&memory[bytes][n_sent.saturating_sub(HEADER_LEN)..]);
            }
            rest.extend(header(Tag::Farewell, operation, words.len()));
            rest.extend(words);
            (link, rest)
        };
        Self { rests: links.into_iter().map(with_rest).collect() }
    }

    /// Says them and closes the connections, in `limit` at most. What still comes is thrown away until the others close
    /// too: a connection that is closed before it was read to its end takes the words that are on their way with it.
    pub(super) fn say(mut self, limit: Duration) {
        let (until, mut waste) = (Instant::now() + limit, vec![0; PIECE]);
        loop {
            self.rests.retain_mut(|(link, rest)| say_more(&mut link.stream, rest, &mut waste));
            let interest = |rest: &[u8]| if rest.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            let mut fds: Vec<_> = self.rests.iter().map(|(link, rest)| link.poll_fd(interest(rest))).collect();
            if fds.is_empty() || Instant::now() >= until || wait_ready(&mut fds, until).is_err() {
                return;
            }
        }
    }
}

/// Whether there is still something to send, or to wait for.
fn say_more(stream: &mut TcpStream, rest: &mut Vec<u8>, waste: &mut [u8]) -> bool {
    if !rest.is_empty() {
        match stream.write(rest) {
            Ok(n) => drop(rest.drain(..n)),
            Err(error) if would_block(&error) => {}
            Err(_) => return false,
        }
        if rest.is_empty() && stream.shutdown(Shutdown::Write).is_err() {
            return false;
        }
    }
    match stream.read(waste) {
        Ok(n) => n > 0,
        Err(error) => would_block(&error),
    }
}
