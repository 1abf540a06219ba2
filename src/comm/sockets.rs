//! Sockets with deadlines.

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout};

use crate::error::{Error, Result};

/// What is left until a moment; nothing if it has passed.
pub(super) fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// A span of time for people.
pub(super) fn shown(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

/// Waits until one of the sockets is ready, or until a moment.
pub(super) fn wait_ready(fds: &mut [PollFd<'_>], until: Instant) -> io::Result<()> {
    // A timeout is rounded up: otherwise the last fraction of a millisecond would be waited for in a busy loop.
    let timeout = Timespec::try_from(left(until) + Duration::from_millis(1)).ok();
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Fills a buffer from a blocking socket before a moment.
pub(super) fn read_exact_until(stream: &mut TcpStream, buffer: &mut [u8], until: Instant) -> io::Result<()> {
    let mut n_read = 0;
    while n_read < buffer.len() {
        let left = left(until);
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer[n_read..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => n_read += n,
            // What the read timeout ends reads as would-block; timed out is the connection itself.
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether a call on a socket has merely to be made again later.
pub(super) fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Has the systems at both ends of a connection ask each other whether they are still there, so that it fails with
/// [`is_out_of_reach`] when nothing has come from the other one for so long; zero: never.
///
/// Systems answer for processes that are slow or stopped. But only while next to nothing is said on the connection: where
/// the other process does not read and its buffer is full, a system that answers is taken for lost all the same.
pub(super) fn watch(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    if timeout.is_zero() {
        return Ok(());
    }
    // First after a third of the time and then at every sixth: of four questions, three may be lost. Whole seconds only.
    let part = |n: u64| Duration::from_secs((timeout.as_secs() / n).max(1));
    set_tcp_keepidle(stream, part(3))?;
    set_tcp_keepintvl(stream, part(6))?;
    // Takes the place of a number of questions, and ends what is on its way and not acknowledged as well.
    set_tcp_user_timeout(stream, u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX))?;
    Ok(set_socket_keepalive(stream, true)?)
}

/// Whether an error of a connection means that the other machine, or the way to it, is gone.
pub(super) fn is_out_of_reach(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown
    )
}

/// Connects before a moment.
pub(super) fn connect(address: SocketAddr, until: Instant) -> io::Result<TcpStream> {
    let left = left(until);
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::connect_timeout(&address, left)?;
    // Where nobody listens on a port of the range that the system draws from, a socket may be given that very port and
    // meet itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens at an address; port 0 takes a free one.
pub(super) fn bind(at: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(at).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    listener.map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::AddrInUse => {
                "another process listens there: end it, or name another port, the same for all ranks"
            }
            ErrorKind::AddrNotAvailable => {
                "no interface of this machine has that address: name one that `ip address` lists"
            }
            ErrorKind::PermissionDenied => "ports below 1024 are the system's: name a higher one",
            _ => "name another interface or port",
        };
        Error::failed(at.to_string(), format!("cannot listen there: {error}")).hint(hint)
    })
}

/// The address that a listener was given.
pub(super) fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| Error::failed("a listener of this rank", format!("has no address: {error}")))
}
