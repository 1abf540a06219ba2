//! A rank's place in its job, and who has come to the meeting.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::{Error, Result};

/// A rank's place in its job.
#[derive(Clone)]
pub struct Place {
    /// This rank, from 0.
    pub rank: usize,
    /// How many ranks the job has.
    pub world_size: usize,
    /// `host:port` where the launcher, or rank 0 of a job without one, listens.
    pub address: String,
    /// What this rank's own listener binds to.
    pub interface: IpAddr,
    /// The secret of the job, the same for all ranks.
    pub token: Vec<u8>,
    /// How long all may take to meet.
    pub deadline: Duration,
    /// How long a collective may stand still.
    pub timeout: Duration,
    /// How long nothing may come from another rank's machine, be it a word of its system alone; zero: for ever.
    pub link_timeout: Duration,
    /// Who has come so far, where this process listens for them.
    pub came: Arc<Mutex<Arrivals>>,
}

/// Who has come to a meeting.
#[derive(Debug, Clone, Default)]
pub struct Arrivals {
    /// Ranks that are there.
    pub ranks: Vec<usize>,
    /// Connections that ended without a proof that they belong to the job.
    pub n_strangers: usize,
}

impl Place {
    /// The interface unless another one is given: ranks on one host.
    pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    /// The link timeout where nothing else is given: networks that mend themselves (a spanning tree, a route, a link that
    /// is negotiated again) take some seconds, and half a minute of many machines is not much to lose.
    pub const LINK_TIMEOUT: Duration = Duration::from_secs(30);

    /// Refuses a rank that the job does not have.
    pub(super) fn check(&self) -> Result<()> {
        if self.rank < self.world_size {
            return Ok(());
        }
        let what = format!("rank {} is out of range: a job of {} ranks counts them from 0", self.rank, self.world_size);
        Err(Error::invalid("the place of this rank", what).hint("see what the launcher set as rank and world size"))
    }
}

impl fmt::Debug for Place {
    /// Without the token, which must not come into any log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, world_size, address, interface, token: _, deadline, timeout, link_timeout, came: _ } = self;
        write!(f, "rank {rank} of {world_size} by {address} on {interface}, deadline {deadline:?}, ")?;
        write!(f, "timeout {timeout:?}, of links {link_timeout:?}")
    }
}
