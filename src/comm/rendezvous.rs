//! How the ranks of a job find each other: everyone calls one listener, proves that it belongs to the job, and is told where
//! all the others listen once all are there. Then every rank connects to those below it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::acceptor::{Acceptor, Guest};
use super::handshake::{Hello, Key, Purpose, Talk, Verdict, call, fresh_nonce};
use super::link::Connection;
use super::place::{Arrivals, Place};
use super::sockets::{bind, connect, is_out_of_reach, left, local_address, shown, watch, would_block};
use crate::error::{Error, Result};

/// How often a meeting looks whether it was called off, and whether those who wait are still there.
const LOOK: Duration = Duration::from_millis(100);
/// How much longer than its own deadline a rank waits for the listener's words about it.
const GRACE: Duration = Duration::from_secs(2);
/// How long a meeting that did not come about still tells those who come why.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// The pause before a listener that is not there yet is called again.
const RETRY: Duration = Duration::from_millis(50);

/// The listener of a job, in a thread of its own: brings the ranks together once.
#[derive(Debug)]
pub struct Rendezvous {
    address: SocketAddr,
    is_called_off: Arc<AtomicBool>,
    meeting: Option<JoinHandle<Result<()>>>,
}

impl Rendezvous {
    /// Listens at a free port of an interface.
    ///
    /// # Errors
    /// An address that cannot be listened at; an empty token.
    pub fn listen(interface: IpAddr, world_size: usize, token: &[u8], deadline: Duration) -> Result<Self> {
        Self::listen_at(SocketAddr::new(interface, 0), world_size, token, deadline, Arc::default())
    }

    /// Listens at a port that all ranks know beforehand; `came` holds those who have come.
    ///
    /// # Errors
    /// As [`Rendezvous::listen`].
    pub fn listen_at(
        at: SocketAddr,
        world_size: usize,
        token: &[u8],
        deadline: Duration,
        came: Arc<Mutex<Arrivals>>,
    ) -> Result<Self> {
        let key = Key::new(token)?;
        let listener = bind(at)?;
        let address = local_address(&listener)?;
        let is_called_off = Arc::new(AtomicBool::new(false));
        let mut meeting = Meeting {
            address,
            world_size,
            deadline,
            until: Instant::now() + deadline,
            acceptor: Acceptor::new(listener, key, &[Purpose::Rendezvous]),
            guests: BTreeMap::new(),
            gone: BTreeSet::new(),
            came,
            is_called_off: Arc::clone(&is_called_off),
        };
        let thread = std::thread::Builder::new().name("rendezvous".into()).spawn(move || meeting.hold());
        let thread = thread.map_err(|e| Error::failed("the rendezvous", format!("no thread for it: {e}")))?;
        Ok(Self { address, is_called_off, meeting: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until all ranks have met, or it is clear that they will not; ranks are told by then.
    ///
    /// # Errors
    /// Ranks that are missing when the deadline has passed; a rank that came twice or with another world size.
    pub fn finish(mut self) -> Result<()> {
        match self.meeting.take().map(JoinHandle::join) {
            Some(Ok(end)) => end,
            Some(Err(panic)) => Err(Error::of_panic("the rendezvous", &*panic)),
            None => Ok(()),
        }
    }
}

impl Drop for Rendezvous {
    /// Calls the meeting off, unless it is over; who waits is told.
    fn drop(&mut self) {
        self.is_called_off.store(true, Ordering::SeqCst);
        if let Some(meeting) = self.meeting.take() {
            let _ = meeting.join();
        }
    }
}

struct Meeting {
    address: SocketAddr,
    world_size: usize,
    deadline: Duration,
    /// The first deadline of all that have come, and the listener's own.
    until: Instant,
    acceptor: Acceptor,
    guests: BTreeMap<usize, Guest>,
    /// Ranks that came and went again.
    gone: BTreeSet<usize>,
    /// Those who are there, for others to see.
    came: Arc<Mutex<Arrivals>>,
    is_called_off: Arc<AtomicBool>,
}

/// Why a meeting did not come about.
struct Refusal {
    what: String,
    hint: String,
}

impl Meeting {
    fn hold(&mut self) -> Result<()> {
        let refusal = match self.gather() {
            Ok(None) => {
                let addresses = self.guests.values().map(|guest| guest.hello.address).collect();
                self.tell(&Verdict::Table(fresh_nonce()?, addresses));
                return Ok(());
            }
            Ok(Some(refusal)) => refusal,
            Err(error) => Refusal { what: error.to_string(), hint: String::new() },
        };
        let verdict = Verdict::Refusal { what: refusal.what.clone(), hint: refusal.hint.clone() };
        self.tell(&verdict);
        // Who calls it off does not wait, but those who have said hello by then are told too.
        let is_called_off = self.is_called_off.load(Ordering::SeqCst);
        let until = Instant::now() + if is_called_off { Duration::ZERO } else { AFTERWARDS };
        while let Ok(Some(mut guest)) = self.acceptor.next_guest(until) {
            guest.tell(&verdict);
        }
        Err(Error::failed(format!("the rendezvous at {}", self.address), refusal.what).hint(refusal.hint))
    }

    /// Waits until all are there; gives the reason where they will not be.
    fn gather(&mut self) -> Result<Option<Refusal>> {
        loop {
            self.miss_those_who_left();
            *self.came.lock().unwrap_or_else(PoisonError::into_inner) =
                Arrivals { ranks: self.guests.keys().copied().collect(), n_strangers: self.acceptor.n_strangers() };
            if self.guests.len() == self.world_size {
                return Ok(None);
            }
            if self.is_called_off.load(Ordering::SeqCst) {
                return Ok(Some(Refusal {
                    what: "was called off by who listened there".into(),
                    hint: "see what the launcher, or rank 0, says".into(),
                }));
            }
            let now = Instant::now();
            if now >= self.until {
                return Ok(Some(self.too_late()));
            }
            if let Some(guest) = self.acceptor.next_guest(self.until.min(now + LOOK))? {
                self.until = self.until.min(Instant::now() + guest.hello.patience);
                // A machine that is gone gives its seat back. Without the watch it would only do so later.
                let _ = watch(&guest.stream, Place::LINK_TIMEOUT);
                // A seat may have become free while this one was on its way.
                self.miss_those_who_left();
                let refusal = self.judge(&guest);
                // Who is refused is told like everyone else: a second guest of one rank takes a place of its own.
                let seat = if refusal.is_some() { usize::MAX } else { guest.hello.rank };
                self.guests.insert(seat, guest);
                if refusal.is_some() {
                    return Ok(refusal);
                }
            }
        }
    }

    fn judge(&self, guest: &Guest) -> Option<Refusal> {
        let (Hello { rank, world_size, .. }, from) = (guest.hello, guest.from);
        if world_size != self.world_size {
            return Some(Refusal {
                what: format!(
                    "rank {rank} (from {from}) says that the job has {world_size} ranks, this listener was told {}",
                    self.world_size
                ),
                hint: "give every machine the same --nnodes and --nproc, or every process the same WORLD_SIZE".into(),
            });
        }
        if rank >= world_size {
            return Some(Refusal {
                what: format!(
                    "rank {rank} (from {from}) is out of range: a job of {world_size} ranks counts them from 0"
                ),
                hint: "see what the launcher set as rank".into(),
            });
        }
        let first = self.guests.get(&rank)?;
        Some(Refusal {
            what: format!("rank {rank} has come twice: from {} and from {from}", first.from),
            hint: "start each rank once: give every machine its own --node-rank, or every process its own RANK".into(),
        })
    }

    fn miss_those_who_left(&mut self) {
        let has_left = |guest: &Guest| match guest.stream.peek(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => !would_block(&error),
        };
        let left: Vec<usize> = self.guests.iter().filter(|(_, guest)| has_left(guest)).map(|(rank, _)| *rank).collect();
        for rank in left {
            self.guests.remove(&rank);
            self.gone.insert(rank);
        }
    }

    fn too_late(&self) -> Refusal {
        let missing = (0..self.world_size).filter(|rank| !self.guests.contains_key(rank));
        let missing: Vec<String> = missing
            .map(|rank| match self.gone.contains(&rank) {
                true => format!("rank {rank} (came and went again)"),
                false => format!("rank {rank}"),
            })
            .collect();
        let (n_there, world_size) = (self.guests.len(), self.world_size);
        let mut what = format!(
            "{n_there} of {world_size} ranks came before the deadline ({}); missing: {}",
            shown(self.deadline),
            missing.join(", ")
        );
        match self.acceptor.n_strangers() {
            0 => {}
            n => what.push_str(&format!("; {n} connections did not prove that they belong to the job")),
        }
        let hint = "see whether the missing ranks started, reach this address and hold the same BELLORA_TOKEN, or give them more time";
        Refusal { what, hint: hint.into() }
    }

    /// Tells everyone who is there.
    fn tell(&mut self, verdict: &Verdict) {
        self.guests.values_mut().for_each(|guest| guest.tell(verdict));
    }
}

/// Joins a job: gives this rank's connections to all others in the order of their ranks.
///
/// # Errors
/// Whatever keeps the ranks from meeting, with the place, before the deadline.
pub(super) fn join(place: &Place) -> Result<Vec<(usize, Connection)>> {
    place.check()?;
    let until = Instant::now() + place.deadline;
    let key = Key::new(&place.token)?;
    let listener = bind(SocketAddr::new(place.interface, 0))?;
    let at = format!("the rendezvous at {}", place.address);

    let mut stream = reach(place, &at, until)?;
    let own = local_address(&listener).and_then(|own| own_address(own, &stream, &at))?;
    let (rank, world_size) = (place.rank, place.world_size);
    let hello = || Hello { rank, world_size, patience: left(until), address: own };
    let talk = call(&mut stream, &key, Purpose::Rendezvous, &hello(), &at, until)?;
    watch(&stream, place.link_timeout).map_err(|error| unusable(&at, &error))?;
    let (session, addresses) = await_table(place, &at, &talk, &mut stream, until)?;

    let key = key.of_session(&session);
    let mut mesh = Mesh { rank, world_size, streams: BTreeMap::new() };
    for (other, address) in addresses.iter().enumerate().take(rank) {
        for purpose in Mesh::PURPOSES {
            let at = format!("rank {other} at {address}");
            let mut stream = connect(*address, until).map_err(|error| {
                Error::failed(&at, format!("cannot be reached: {error}")).hint(
                    "see whether that rank still runs; between machines, give each the interface by which the others reach \
                     it, and open its ports to them",
                )
            })?;
            call(&mut stream, &key, purpose, &hello(), &at, until)?;
            mesh.add(other, purpose, stream);
        }
    }
    let mut acceptor = Acceptor::new(listener, key, &Mesh::PURPOSES);
    while mesh.streams.len() < Mesh::PURPOSES.len() * (world_size - 1) {
        match acceptor.next_guest(until)? {
            // Who belongs to the job and yet has no place here finds the connection closed.
            Some(guest) if guest.hello.rank > rank => mesh.add(guest.hello.rank, guest.talk.purpose, guest.stream),
            Some(_) => {}
            None => return Err(mesh.too_late(place)),
        }
    }
    mesh.connections(&addresses, place.link_timeout)
}

/// The connections to the other ranks, as they come about: two to each.
struct Mesh {
    rank: usize,
    world_size: usize,
    streams: BTreeMap<(usize, u8), TcpStream>,
}

impl Mesh {
    const PURPOSES: [Purpose; 2] = [Purpose::Mesh, Purpose::Lifeline];

    /// Adds a connection that is not there yet.
    fn add(&mut self, other: usize, purpose: Purpose, stream: TcpStream) {
        if other < self.world_size {
            self.streams.entry((other, purpose as u8)).or_insert(stream);
        }
    }

    fn too_late(&self, place: &Place) -> Error {
        let is_missing =
            |other: &usize| Self::PURPOSES.iter().any(|purpose| !self.streams.contains_key(&(*other, *purpose as u8)));
        let missing = (self.rank + 1..self.world_size).filter(is_missing);
        let missing: Vec<String> = missing.map(|other| format!("rank {other}")).collect();
        let what = format!(
            "these met at {} but did not connect within {}: {}",
            place.address,
            shown(place.deadline),
            missing.join(", ")
        );
        Error::failed(format!("rank {} of {}", self.rank, self.world_size), what)
            .hint("see what they say; between machines, see that each reaches the others' interfaces")
    }

    /// What it amounts to when all are there; `addresses` are those of all ranks.
    fn connections(mut self, addresses: &[SocketAddr], link_timeout: Duration) -> Result<Vec<(usize, Connection)>> {
        let mut connections = Vec::new();
        for (other, address) in addresses.iter().enumerate() {
            let [stream, lifeline] = Self::PURPOSES.map(|purpose| self.streams.remove(&(other, purpose as u8)));
            let Some((stream, lifeline)) = stream.zip(lifeline) else { continue };
            let ready = [&stream, &lifeline].into_iter().try_for_each(|socket| socket.set_nonblocking(true));
            let ready = ready.and_then(|()| watch(&lifeline, link_timeout));
            ready.map_err(|error| unusable(&format!("the connection to rank {other}"), &error))?;
            connections.push((other, Connection { address: address.ip(), stream, lifeline }));
        }
        Ok(connections)
    }
}

fn unusable(at: &str, error: &std::io::Error) -> Error {
    Error::failed(at, format!("the connection cannot be set up: {error}"))
}

/// Connects to the rendezvous; a listener that is not there yet is called again until the deadline.
fn reach(place: &Place, at: &str, until: Instant) -> Result<TcpStream> {
    let resolved = place.address.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    let addresses = resolved.map_err(|error| {
        Error::failed(at, format!("the address cannot be resolved: {error}"))
            .hint("write host:port, with a host that this machine knows")
    })?;
    loop {
        let mut said = "the host has no address".to_string();
        for address in &addresses {
            // One that swallows packets must not keep the others from being tried.
            match connect(*address, until.min(Instant::now() + Duration::from_secs(5))) {
                Ok(stream) => return Ok(stream),
                Err(error) => said = error.to_string(),
            }
        }
        if left(until) <= RETRY {
            let what = format!("cannot be reached within {}: {said}", shown(place.deadline));
            return Err(Error::failed(at, what)
                .hint("start machine 0, or rank 0, as well; see that host and port are right, that no firewall closes the port, and \
                       that this rank was not started twice: once all have met, nobody listens there any more"));
        }
        std::thread::sleep(RETRY);
    }
}

/// The address under which the others find this rank's listener.
fn own_address(own: SocketAddr, to_rendezvous: &TcpStream, at: &str) -> Result<SocketAddr> {
    let ends =
        to_rendezvous.local_addr().and_then(|here| to_rendezvous.peer_addr().map(|there| (here.ip(), there.ip())));
    let (here, there) = ends.map_err(|error| Error::failed(at, format!("the connection failed: {error}")))?;
    if own.ip().is_loopback() && !here.is_loopback() && here != there {
        let what = format!(
            "is on another machine, but this rank listens on {} only, where that one cannot reach it",
            own.ip()
        );
        return Err(Error::failed(at, what)
            .hint(format!("name the interface by which the machines reach each other, such as {here}")));
    }
    // A rank that listens everywhere is found where it comes from.
    Ok(SocketAddr::new(if own.ip().is_unspecified() { here } else { own.ip() }, own.port()))
}

fn await_table(
    place: &Place,
    at: &str,
    talk: &Talk,
    stream: &mut TcpStream,
    until: Instant,
) -> Result<([u8; 32], Vec<SocketAddr>)> {
    match talk.read_verdict(stream, until + GRACE) {
        Ok(Verdict::Table(session, addresses)) if addresses.len() == place.world_size => Ok((session, addresses)),
        Ok(Verdict::Table(..)) => Err(Error::failed(at, "gave a table of another job")),
        Ok(Verdict::Refusal { what, hint }) => Err(Error::failed(at, what).hint(hint)),
        Err(error) => {
            let what = match error.kind() {
                _ if error.raw_os_error().is_some() && is_out_of_reach(&error) => {
                    let what = format!("its machine, or the link to it, is gone ({error})");
                    return Err(
                        Error::failed(at, what).hint("see that machine 0 runs and that the network leads there")
                    );
                }
                std::io::ErrorKind::TimedOut => {
                    format!("took this rank in and has said nothing more within {}", shown(place.deadline))
                }
                std::io::ErrorKind::InvalidData => "said what a rendezvous does not say".to_string(),
                _ => format!("closed the connection before all ranks were there ({error})"),
            };
            Err(Error::failed(at, what).hint("see what the launcher, or rank 0, says"))
        }
    }
}
