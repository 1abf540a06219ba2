//! A listener that accepts ranks of the job alone. Strangers who connect and say nothing, or nonsense, hold nobody up.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::handshake::{CALL_LEN, HELLO_LEN, Hello, Key, Purpose, Talk, Verdict, fresh_nonce};
use super::sockets::{wait_ready, would_block};
use crate::error::{Error, Result};

/// Connections that have not proven themselves yet; of more than that, the oldest is closed. A rank needs two round trips.
const MOST_VISITORS: usize = 256;

/// A listener with those who have come and not yet proven who they are.
#[derive(Debug)]
pub(super) struct Acceptor {
    listener: TcpListener,
    key: Key,
    purposes: &'static [Purpose],
    visitors: Vec<Visitor>,
    n_strangers: usize,
}

/// A rank that was let in.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) stream: TcpStream,
    pub(super) from: SocketAddr,
    pub(super) hello: Hello,
    pub(super) talk: Talk,
}

impl Guest {
    /// Says how the meeting ended. Whom it does not reach has gone, which the others find when they look for it.
    pub(super) fn tell(&mut self, verdict: &Verdict) {
        // The buffer of a connection that has carried next to nothing yet has room for thousands of addresses.
        let _ = self.stream.write_all(&self.talk.verdict(verdict));
    }
}

#[derive(Debug)]
struct Visitor {
    stream: TcpStream,
    from: SocketAddr,
    /// What has come of the message that is waited for: of a call, then, where there is a talk, of a hello.
    heard: [u8; HELLO_LEN],
    n_heard: usize,
    talk: Option<Talk>,
}

enum Step {
    Waits,
    Proven(Hello, Talk),
    IsStranger,
}

impl Acceptor {
    /// Lets ranks in at a listener that does not block, who come for one of these purposes.
    pub(super) fn new(listener: TcpListener, key: Key, purposes: &'static [Purpose]) -> Self {
        Self { listener, key, purposes, visitors: Vec::new(), n_strangers: 0 }
    }

    /// How many connections ended without a proof.
    pub(super) fn n_strangers(&self) -> usize {
        self.n_strangers
    }

    /// Waits for the next rank, or until a moment.
    pub(super) fn next_guest(&mut self, until: Instant) -> Result<Option<Guest>> {
        loop {
            if let Some(guest) = self.hear_visitors()? {
                return Ok(Some(guest));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
            fds.extend(self.visitors.iter().map(|visitor| PollFd::new(&visitor.stream, PollFlags::IN)));
            wait_ready(&mut fds, until).map_err(|e| Error::failed("waiting for ranks", e.to_string()))?;
            self.accept();
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                        continue;
                    }
                    if self.visitors.len() == MOST_VISITORS {
                        self.visitors.remove(0);
                        self.n_strangers += 1;
                    }
                    self.visitors.push(Visitor { stream, from, heard: [0; HELLO_LEN], n_heard: 0, talk: None });
                }
                Err(error) if would_block(&error) => return,
                // Whoever it was has gone again; or the process is short of something, which may pass.
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
        }
    }

    fn hear_visitors(&mut self) -> Result<Option<Guest>> {
        let mut at = 0;
        while at < self.visitors.len() {
            match self.visitors[at].hear(&self.key, self.purposes)? {
                Step::Waits => at += 1,
                Step::IsStranger => {
                    self.visitors.remove(at);
                    self.n_strangers += 1;
                }
                Step::Proven(hello, talk) => {
                    let Visitor { stream, from, .. } = self.visitors.remove(at);
                    return Ok(Some(Guest { stream, from, hello, talk }));
                }
            }
        }
        Ok(None)
    }
}

impl Visitor {
    fn hear(&mut self, key: &Key, purposes: &[Purpose]) -> Result<Step> {
        loop {
            let awaited = if self.talk.is_some() { HELLO_LEN } else { CALL_LEN };
            match self.stream.read(&mut self.heard[self.n_heard..awaited]) {
                Ok(0) => return Ok(Step::IsStranger),
                Ok(n) => self.n_heard += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Ok(Step::Waits),
                Err(_) => return Ok(Step::IsStranger),
            }
            if self.n_heard < awaited {
                continue;
            }
            if let Some(talk) = self.talk.take() {
                return Ok(match talk.hello(&self.heard) {
                    Some(hello) => Step::Proven(hello, talk),
                    None => Step::IsStranger,
                });
            }
            let call = self.heard.first_chunk::<CALL_LEN>().expect("a hello is longer than a call");
            let Some((talk, answer)) = Talk::answer(key, purposes, call, fresh_nonce()?) else {
                return Ok(Step::IsStranger);
            };
            // The buffer of a fresh connection has room for it.
            if self.stream.write_all(&answer).is_err() {
                return Ok(Step::IsStranger);
            }
            (self.talk, self.n_heard) = (Some(talk), 0);
        }
    }
}
