//! Who belongs to the job: both ends of a new connection prove that they hold the job's token, by HMAC-SHA256 over fresh
//! nonces of both.
//!
//! The caller sends a call (41 bytes: magic, purpose, nonce); the listener answers (72: magic, nonce, proof); the caller says
//! hello (62: rank, world size, patience, address of its own listener, proof). What the listener says later goes out as
//! a [`Verdict`], with a proof too. Each proof covers the role of who gives it, the purpose and both nonces, so none can be
//! sent back or used again.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

use super::sockets::read_exact_until;
use crate::error::{Error, Result};

/// The last byte is the version of the protocol.
const MAGIC: [u8; 8] = *b"BELLORA\x02";
const NONCE_LEN: usize = 32;
const PROOF_LEN: usize = 32;
pub(super) const CALL_LEN: usize = MAGIC.len() + 1 + NONCE_LEN;
const ANSWER_LEN: usize = MAGIC.len() + NONCE_LEN + PROOF_LEN;
const ADDRESS_LEN: usize = 18;
const HELLO_BODY_LEN: usize = 12 + ADDRESS_LEN;
pub(super) const HELLO_LEN: usize = HELLO_BODY_LEN + PROOF_LEN;
/// Far above any table of addresses.
const VERDICT_MOST: usize = 1 << 20;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Purpose {
    Rendezvous = 1,
    Mesh = 2,
    Lifeline = 3,
}

/// Who says something.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Role {
    Answer = 1,
    Hello = 2,
    Verdict = 3,
    Session = 4,
}

/// A number that was never used before.
pub(super) type Nonce = [u8; NONCE_LEN];

/// Draws a nonce from the system.
pub(super) fn fresh_nonce() -> Result<Nonce> {
    let mut nonce = [0; NONCE_LEN];
    match getrandom(&mut nonce, GetRandomFlags::empty()) {
        Ok(NONCE_LEN) => Ok(nonce),
        Ok(_) => Err(Error::failed("the system's random numbers", "came short")),
        Err(error) => Err(Error::failed("the system's random numbers", error.to_string())),
    }
}

/// Draws a secret for a job: text that nobody can guess.
///
/// # Errors
/// A system that gives no random numbers.
pub fn fresh_token() -> Result<String> {
    Ok(fresh_nonce()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The secret that makes a process a rank of the job.
#[derive(Clone)]
pub(super) struct Key(Vec<u8>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// # Errors
    /// An empty token, which everybody would hold.
    pub(super) fn new(token: &[u8]) -> Result<Self> {
        if token.is_empty() {
            return Err(Error::invalid("the job's token", "is empty")
                .hint("give every rank the same random text; the launcher makes one"));
        }
        Ok(Self(token.to_vec()))
    }

    /// The key of one meeting's mesh: ranks of an earlier attempt under the same token do not hold it.
    pub(super) fn of_session(&self, session: &Nonce) -> Self {
        Self(self.mac(Role::Session, &[session]).finalize().into_bytes().to_vec())
    }

    fn mac(&self, role: Role, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(&[role as u8]);
        parts.iter().for_each(|part| mac.update(part));
        mac
    }
}

/// What both ends of a connection know of it.
#[derive(Debug, Clone)]
pub(super) struct Talk {
    key: Key,
    pub(super) purpose: Purpose,
    caller: Nonce,
    listener: Nonce,
}

impl Talk {
    fn mac(&self, role: Role, body: &[u8]) -> Hmac<Sha256> {
        // All but the body has a fixed length, so no two messages read alike.
        self.key.mac(role, &[&[self.purpose as u8], &self.caller, &self.listener, body])
    }

    fn proof(&self, role: Role, body: &[u8]) -> [u8; PROOF_LEN] {
        self.mac(role, body).finalize().into_bytes().into()
    }

    fn is_proven(&self, role: Role, body: &[u8], proof: &[u8]) -> bool {
        self.mac(role, body).verify_slice(proof).is_ok()
    }

    /// The listener's side: reads a call and makes the answer to it; `None` if it is no call of these purposes.
    pub(super) fn answer(
        key: &Key,
        purposes: &[Purpose],
        call: &[u8; CALL_LEN],
        listener: Nonce,
    ) -> Option<(Self, [u8; ANSWER_LEN])> {
        let (magic, rest) = call.split_first_chunk::<8>()?;
        let (&[asked], rest) = rest.split_first_chunk::<1>()?;
        if *magic != MAGIC {
            return None;
        }
        let purpose = purposes.iter().copied().find(|purpose| *purpose as u8 == asked)?;
        let talk = Self { key: key.clone(), purpose, caller: rest.try_into().ok()?, listener };
        let mut answer = [0; ANSWER_LEN];
        answer[..8].copy_from_slice(&MAGIC);
        answer[8..8 + NONCE_LEN].copy_from_slice(&listener);
        answer[8 + NONCE_LEN..].copy_from_slice(&talk.proof(Role::Answer, &[]));
        Some((talk, answer))
    }

    /// The listener's side: reads a hello; `None` if it proves nothing.
    pub(super) fn hello(&self, bytes: &[u8; HELLO_LEN]) -> Option<Hello> {
        let (body, proof) = bytes.split_first_chunk::<HELLO_BODY_LEN>()?;
        self.is_proven(Role::Hello, body, proof).then(|| Hello::read(body))
    }

    /// The listener's side: a verdict as it goes over the wire.
    pub(super) fn verdict(&self, verdict: &Verdict) -> Vec<u8> {
        let (tag, body) = match verdict {
            Verdict::Table(session, addresses) => {
                let addresses = addresses.iter().flat_map(|address| address_bytes(*address));
                (1, session.iter().copied().chain(addresses).collect::<Vec<u8>>())
            }
            Verdict::Refusal { what, hint } => (2, format!("{what}\0{hint}").into_bytes()),
        };
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(&body);
        let proof = self.proof(Role::Verdict, &bytes);
        bytes.extend(proof);
        bytes
    }

    /// The caller's side: waits for a verdict.
    pub(super) fn read_verdict(&self, stream: &mut TcpStream, until: Instant) -> io::Result<Verdict> {
        let invalid = || io::Error::from(ErrorKind::InvalidData);
        let mut head = [0; 5];
        read_exact_until(stream, &mut head, until)?;
        let [tag, len @ ..] = head;
        let len = u32::from_le_bytes(len) as usize;
        if len > VERDICT_MOST {
            return Err(invalid());
        }
        let mut message = head.to_vec();
        message.resize(head.len() + len + PROOF_LEN, 0);
        read_exact_until(stream, &mut message[head.len()..], until)?;
        let (signed, proof) = message.split_at(head.len() + len);
        if !self.is_proven(Role::Verdict, signed, proof) {
            return Err(invalid());
        }
        let body = &signed[head.len()..];
        match (tag, body.split_first_chunk::<NONCE_LEN>()) {
            (1, Some((session, rest))) => {
                let addresses = rest.as_chunks::<ADDRESS_LEN>().0.iter().map(address_of).collect();
                Ok(Verdict::Table(*session, addresses))
            }
            (2, _) => {
                let text = String::from_utf8_lossy(body);
                let (what, hint) = text.split_once('\0').unwrap_or((&text, ""));
                Ok(Verdict::Refusal { what: what.into(), hint: hint.into() })
            }
            _ => Err(invalid()),
        }
    }
}

/// What a rank tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    /// How long it will wait from now on.
    pub(super) patience: Duration,
    /// Where it listens itself.
    pub(super) address: SocketAddr,
}

impl Hello {
    fn bytes(&self) -> [u8; HELLO_BODY_LEN] {
        let number = |n: u128| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = [0; HELLO_BODY_LEN];
        bytes[..4].copy_from_slice(&number(self.rank as u128));
        bytes[4..8].copy_from_slice(&number(self.world_size as u128));
        bytes[8..12].copy_from_slice(&number(self.patience.as_millis()));
        bytes[12..].copy_from_slice(&address_bytes(self.address));
        bytes
    }

    fn read(bytes: &[u8; HELLO_BODY_LEN]) -> Self {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut address = [0; ADDRESS_LEN];
        address.copy_from_slice(&bytes[12..]);
        Self {
            rank: number(0) as usize,
            world_size: number(4) as usize,
            patience: Duration::from_millis(number(8).into()),
            address: address_of(&address),
        }
    }
}

/// How a meeting ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All are there: the number of this meeting, and where each rank listens.
    Table(Nonce, Vec<SocketAddr>),
    /// It did not come about.
    Refusal { what: String, hint: String },
}

/// An IPv6 address (IPv4 is mapped) and a port.
fn address_bytes(address: SocketAddr) -> [u8; ADDRESS_LEN] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_LEN];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_le_bytes());
    bytes
}

fn address_of(bytes: &[u8; ADDRESS_LEN]) -> SocketAddr {
    let [ip @ .., low, high] = *bytes;
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(ip)).to_canonical(), u16::from_le_bytes([low, high]))
}

/// The caller's side: proves to a listener that this rank belongs to the job, and has the listener prove the same.
///
/// # Errors
/// A listener that is none of this program's or of another job, that says nothing until the deadline, or goes away;
/// `place` is where they are said to be.
pub(super) fn call(
    stream: &mut TcpStream,
    key: &Key,
    purpose: Purpose,
    hello: &Hello,
    place: &str,
    until: Instant,
) -> Result<Talk> {
    let caller = fresh_nonce()?;
    let mut call = [0; CALL_LEN];
    call[..8].copy_from_slice(&MAGIC);
    call[8] = purpose as u8;
    call[9..].copy_from_slice(&caller);
    let mut answer = [0; ANSWER_LEN];
    let said = stream.write_all(&call).and_then(|()| read_exact_until(stream, &mut answer, until));
    said.map_err(|error| unanswered(place, &error))?;
    let (magic, rest) = answer.split_first_chunk::<8>().expect("an answer is longer");
    let (listener, proof) = rest.split_first_chunk::<NONCE_LEN>().expect("an answer is longer");
    if magic[..7] != MAGIC[..7] {
        return Err(Error::failed(place, "what listens there is no rank or launcher of bellora")
            .hint("name the address that the launcher printed, or a port that nothing else listens at"));
    }
    if *magic != MAGIC {
        let what = format!("speaks version {} of the protocol, this rank version {}", magic[7], MAGIC[7]);
        return Err(Error::failed(place, what).hint("run the same build of bellora on every machine"));
    }
    let talk = Talk { key: key.clone(), purpose, caller, listener: *listener };
    if !talk.is_proven(Role::Answer, &[], proof) {
        return Err(Error::failed(place, "what listens there does not hold this job's token")
            .hint("another job listens there, or the ranks were given different tokens: give all of them the same BELLORA_TOKEN"));
    }
    let body = hello.bytes();
    let mut message = [0; HELLO_LEN];
    message[..HELLO_BODY_LEN].copy_from_slice(&body);
    message[HELLO_BODY_LEN..].copy_from_slice(&talk.proof(Role::Hello, &body));
    stream.write_all(&message).map_err(|error| unanswered(place, &error))?;
    Ok(talk)
}

/// A connection that ended before a word of the handshake came.
fn unanswered(place: &str, error: &io::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::TimedOut => "took the connection and said nothing until the deadline".to_string(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "closed the connection without an answer".to_string()
        }
        _ => format!("the connection failed: {error}"),
    };
    Error::failed(place, what)
        .hint("see that the address is that of this job's launcher or rank 0, and that it still runs")
}
