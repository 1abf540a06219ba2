//! What the ranks of a job say to each other: sums, parts and copies of tensors.
//!
//! [`Solo`] is a run of one rank. [`Tcp`] joins processes on CPUs, on one host or a few, over plain TCP: meant for tests and
//! small runs, exact to test against since it adds in rank order. [`Nccl`] joins GPUs. How ranks find each other is
//! [`rendezvous`].
//! `docs/ranks.md` describes the protocol and what of it is authenticated.

mod acceptor;
mod communicator;
mod exchange;
mod frame;
mod handshake;
mod link;
mod nccl;
mod place;
pub mod rendezvous;
mod sockets;
mod solo;
mod tcp;

pub use communicator::{Communicator, broadcast_bytes};
pub use handshake::fresh_token;
pub use nccl::Nccl;
pub use place::{Arrivals, Place};
pub use rendezvous::Rendezvous;
pub use solo::Solo;
pub use tcp::Tcp;
