//! Which part of a job this process is: all of it, one of its ranks, or the one that starts and watches them.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tch::Device;

use crate::cli::claim::{Claim, variable};
use crate::comm::{Arrivals, Communicator, Nccl, Place, Solo, Tcp};
use crate::device;
use crate::error::{Error, Result};
use crate::log::{say, speak_as_rank};

/// What the supervisor tells a rank of its place.
pub(super) mod told {
    pub(crate) const RANK: &str = "BELLORA_RANK";
    pub(crate) const WORLD_SIZE: &str = "BELLORA_WORLD_SIZE";
    pub(crate) const LOCAL_WORLD_SIZE: &str = "BELLORA_LOCAL_WORLD_SIZE";
    pub(crate) const RENDEZVOUS: &str = "BELLORA_RENDEZVOUS";
    pub(crate) const INTERFACE: &str = "BELLORA_INTERFACE";
    pub(crate) const MEET_TIMEOUT: &str = "BELLORA_MEET_TIMEOUT";
    pub(crate) const TIMEOUT: &str = "BELLORA_TIMEOUT";
    pub(crate) const LINK_TIMEOUT: &str = "BELLORA_LINK_TIMEOUT";
    pub(crate) const SUPERVISOR: &str = "BELLORA_SUPERVISOR";
    /// Also read where another program starts the ranks: the secret by which they know each other.
    pub(crate) const TOKEN: &str = "BELLORA_TOKEN";
}

/// Seconds that nobody waits longer than.
const A_YEAR: u64 = 366 * 24 * 3600;
/// Machines that one job may have.
const MOST_MACHINES: usize = 4096;

/// Reads a number of a range from the command line.
pub(super) fn number_in(range: RangeInclusive<usize>) -> impl Fn(&str) -> std::result::Result<usize, String> + Clone {
    move |text| match text.parse::<usize>() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("expected a whole number from {} to {}", range.start(), range.end())),
    }
}

/// How a job is spread over processes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Several processes")]
pub(super) struct RankArgs {
    /// Start so many processes on this machine; auto: one for each GPU
    #[arg(long, value_name = "N|auto")]
    pub(super) nproc: Option<String>,
    /// Machines that share the job
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = number_in(1..=MOST_MACHINES))]
    pub(super) nnodes: usize,
    /// Which of them this one is, from 0
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = number_in(0..=MOST_MACHINES - 1))]
    pub(super) node_rank: usize,
    /// Where the processes meet: an address of machine 0 with a free port
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) rendezvous: Option<String>,
    /// The address of this machine that the other machines reach it by; by default the one that leads to the rendezvous
    #[arg(long, value_name = "IP")]
    pub(super) interface: Option<IpAddr>,
    /// Start all processes again from the newest checkpoint so many times after one has failed
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) max_restarts: u32,
    /// Seconds without any progress after which a job is stopped; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = value_parser!(u64).range(..=A_YEAR))]
    pub(super) hang_timeout: u64,
    /// Seconds without any answer of another machine's system after which it, or the link to it, is taken for lost; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = Place::LINK_TIMEOUT.as_secs(), value_parser = value_parser!(u64).range(..=86_400))]
    pub(super) link_timeout: u64,
    /// Seconds that all processes may take to meet
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = value_parser!(u64).range(1..=A_YEAR))]
    pub(super) meet_timeout: u64,
}

/// What this process is.
#[derive(Debug)]
pub(super) enum Role {
    /// The whole job, or one rank of it.
    Rank(Box<dyn Communicator>),
    /// The one that starts so many ranks on this machine.
    Supervisor(usize),
}

impl RankArgs {
    /// Finds out what this process is, and as a rank meets the others: by NCCL where the model is on GPUs, else by TCP.
    ///
    /// # Errors
    /// A place in a job that cannot be; ranks that do not meet.
    pub(super) fn role(&self, on_gpus: bool) -> Result<Role> {
        if let Some(place) = self.told_by_supervisor()? {
            return Ok(Role::Rank(joined(
                meet(&place, "the supervisor", UNDER_A_SUPERVISOR, Tcp::join)?,
                &place,
                on_gpus,
            )?));
        }
        if self.nproc.is_none() && self.nnodes == 1 {
            let Some((place, claim)) = self.said_once(self.told_by_environment())? else {
                return Ok(Role::Rank(Box::new(Solo)));
            };
            let by = format!("{} and {}", claim.rank_name, claim.world_name);
            // Nobody else listens.
            let tcp = meet(&place, &by, AT_ONCE, if place.rank == 0 { Tcp::lead } else { Tcp::join })?;
            return Ok(Role::Rank(joined(tcp, &place, on_gpus)?));
        }
        let nproc = self.count()?;
        if on_gpus && nproc > device::n_gpus() {
            let what = format!("{nproc} processes, and this machine has {} GPUs for them", device::n_gpus());
            return Err(Error::invalid("--nproc", what).hint("write --nproc auto, or model.device = \"cpu\""));
        }
        if self.node_rank >= self.nnodes {
            let what = format!("expected less than --nnodes {}, found {}", self.nnodes, self.node_rank);
            return Err(Error::invalid("--node-rank", what).hint("the machines count from 0"));
        }
        if self.nnodes > 1 && self.rendezvous.is_none() {
            return Err(Error::invalid("--rendezvous", "several machines need a place to meet")
                .hint("name an address of machine 0 and a free port, the same on all: --rendezvous 10.0.0.1:29400"));
        }
        if nproc * self.nnodes == 1 {
            return Ok(Role::Rank(Box::new(Solo)));
        }
        Ok(Role::Supervisor(nproc))
    }

    /// Has all that this process says carry its rank, where no supervisor sees to that.
    pub(super) fn introduce(&self) {
        if let Some(claim) = self.claim() {
            speak_as_rank(claim.rank);
        }
    }

    /// Leaves it to the first rank of this machine to say what is wrong with what all of them are given.
    pub(super) fn said_once<T>(&self, given: Result<T>) -> Result<T> {
        given.map_err(|error| match error {
            Error::Invalid(_) if self.claim().is_some_and(|claim| !claim.is_first_of_machine()) => {
                Error::SaidByAnother { exit_code: error.exit_code() }
            }
            error => error,
        })
    }

    /// What another program than a supervisor of ours says of this process's place among several.
    fn claim(&self) -> Option<Claim> {
        let is_asked = !is_supervised() && self.nproc.is_none() && self.nnodes == 1;
        let claim = if is_asked { Claim::of_environment().ok().flatten() } else { None };
        claim.filter(|claim| claim.world_size > 1)
    }

    fn count(&self) -> Result<usize> {
        let wrong = |what: String| Err(Error::invalid("--nproc", what).hint("write a number from 1 on, or auto"));
        match self.nproc.as_deref() {
            None => Ok(1),
            Some("auto") => Ok(device::n_gpus().max(1)),
            Some(text) => match text.parse() {
                Ok(count) if (1..=1024).contains(&count) => Ok(count),
                _ => wrong(format!("expected a number of processes, found {text:?}")),
            },
        }
    }

    fn told_by_supervisor(&self) -> Result<Option<Place>> {
        let Some(supervisor) = variable(told::SUPERVISOR) else { return Ok(None) };
        // Whatever becomes of the supervisor, its ranks end with it.
        let refused =
            |error: rustix::io::Errno| Error::failed("prctl", format!("cannot follow the supervisor: {error}"));
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(refused)?;
        if getppid().map(Pid::as_raw_nonzero).map(|pid| pid.to_string()) != Some(supervisor) {
            return Err(Error::failed("the supervisor", "has ended before this rank began"));
        }
        let missing = |name: &str| Error::failed(name, "is not what the supervisor sets");
        let number = |name: &'static str| -> Result<u64> {
            variable(name).and_then(|text| text.parse().ok()).ok_or_else(|| missing(name))
        };
        let text = |name: &'static str| variable(name).ok_or_else(|| missing(name));
        Ok(Some(Place {
            rank: number(told::RANK)? as usize,
            world_size: number(told::WORLD_SIZE)? as usize,
            address: text(told::RENDEZVOUS)?,
            interface: text(told::INTERFACE)?.parse().map_err(|_| missing(told::INTERFACE))?,
            token: text(told::TOKEN)?.into_bytes(),
            deadline: Duration::from_secs(number(told::MEET_TIMEOUT)?),
            timeout: Duration::from_secs(number(told::TIMEOUT)?),
            link_timeout: Duration::from_secs(number(told::LINK_TIMEOUT)?),
            came: Arc::default(),
        }))
    }

    /// The place that torchrun, srun or mpirun-like programs give a process.
    fn told_by_environment(&self) -> Result<Option<(Place, Claim)>> {
        let Some(claim) = Claim::of_environment()? else { return Ok(None) };
        let Claim { rank_name, rank, world_size, .. } = claim;
        if world_size == 1 {
            return Ok(None);
        }
        let hint = "set MASTER_ADDR and MASTER_PORT to an address of rank 0's machine and a free port";
        let Some((host, port)) = variable("MASTER_ADDR").zip(variable("MASTER_PORT")) else {
            let what =
                format!("{rank_name} says that this is rank {rank} of {world_size}, and nothing says where they meet");
            let missing = if variable("MASTER_ADDR").is_none() { "MASTER_ADDR" } else { "MASTER_PORT" };
            return Err(Error::invalid(missing, what).hint(hint));
        };
        let port: u16 = port
            .parse()
            .map_err(|_| Error::invalid("MASTER_PORT", format!("expected a port, found {port:?}")).hint(hint))?;
        // torchrun's own agent listens at MASTER_PORT.
        let port = if variable("TORCHELASTIC_RUN_ID").is_some() { port.wrapping_add(1) } else { port };
        let address = format!("{host}:{port}");
        // torchrun calls a run `none` unless it is given an id: no secret, and the same for all jobs of the machine.
        let run_id = variable("TORCHELASTIC_RUN_ID").filter(|id| id != "none");
        let known = run_id.or_else(|| variable("SLURM_JOB_ID"));
        let Some(token) = variable(told::TOKEN).or(known) else {
            return Err(Error::invalid(told::TOKEN, "ranks know each other by a secret, and there is none")
                .hint("set BELLORA_TOKEN to the same random text for all ranks; torchrun may give --rdzv-id instead"));
        };
        let interface = match self.interface {
            Some(interface) => interface,
            None => interface_towards(&address)?,
        };
        let place = Place {
            rank,
            world_size,
            address,
            interface,
            token: token.into_bytes(),
            deadline: Duration::from_secs(self.meet_timeout),
            timeout: self.collective_timeout(),
            link_timeout: Duration::from_secs(self.link_timeout),
            came: Arc::default(),
        };
        Ok(Some((place, claim)))
    }

    /// How long a collective may stand still. The supervisor, who sees all ranks, is to notice first.
    pub(super) fn collective_timeout(&self) -> Duration {
        match self.hang_timeout {
            0 => Duration::from_secs(u64::from(u32::MAX)),
            seconds => Duration::from_secs(seconds + 60),
        }
    }
}

/// The variable by which a process is kept to some of the machine's GPUs.
pub(super) const VISIBLE_GPUS: &str = "CUDA_VISIBLE_DEVICES";

/// The GPU of a rank on its machine, of those that this process may see.
pub(super) fn gpu_of(local: usize) -> Option<String> {
    match std::env::var(VISIBLE_GPUS) {
        Err(_) => Some(local.to_string()),
        Ok(visible) => visible.split(',').nth(local).filter(|gpu| !gpu.is_empty()).map(str::to_owned),
    }
}

/// The GPU of the rank that torchrun has started, which lets each of its processes see them all; unless only one is visible
/// already, by what stands between torchrun and this program.
pub(super) fn own_gpu() -> Option<String> {
    variable("TORCHELASTIC_RUN_ID")?;
    let local = variable("LOCAL_RANK")?.parse().ok()?;
    let is_kept_to_one = std::env::var(VISIBLE_GPUS).is_ok_and(|visible| !visible.contains(','));
    if is_kept_to_one { None } else { gpu_of(local) }
}

/// How many of so many ranks run on this machine, this one included, as far as what started them says so.
pub(super) fn on_this_machine(world_size: usize) -> usize {
    const NAMES: [&str; 5] = [
        told::LOCAL_WORLD_SIZE,
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        // "2(x3),1": of the first machine, where rank 0 is.
        "SLURM_TASKS_PER_NODE",
    ];
    let said = NAMES.into_iter().find_map(variable).unwrap_or_default();
    let digits = said.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(1).clamp(1, world_size)
}

/// Whether a supervisor has started this process and watches it.
pub(super) fn is_supervised() -> bool {
    variable(told::SUPERVISOR).is_some()
}

/// How often a process that waits for others says so.
const REMIND: Duration = Duration::from_secs(30);
/// How long a meeting may take before anything is said of it: ranks that come at once are no news.
const AT_ONCE: Duration = Duration::from_millis(500);
/// The same under a supervisor, who has started the ranks of this machine itself.
const UNDER_A_SUPERVISOR: Duration = Duration::from_secs(10);

/// Meets the other ranks. While that takes time, standard error says who waits where, for whom, and what made it a rank.
fn meet(place: &Place, made_by: &str, patience: Duration, meet: fn(&Place) -> Result<Tcp>) -> Result<Tcp> {
    let (met, is_over) = channel::<()>();
    let waiting = place.clone();
    let made_by = made_by.to_owned();
    let tell = move || {
        let started = Instant::now();
        let mut pause = patience;
        while is_over.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            say(&format!("{}\n", who_waits(&waiting, &made_by, started.elapsed())));
            pause = REMIND;
        }
    };
    let no_thread =
        |error: std::io::Error| Error::failed("the meeting", format!("no thread that speaks of it: {error}"));
    let teller = std::thread::Builder::new().name("meeting".to_owned()).spawn(tell).map_err(no_thread)?;
    let tcp = meet(place);
    drop(met);
    let _ = teller.join();
    tcp
}

fn who_waits(place: &Place, made_by: &str, waited: Duration) -> String {
    let Place { rank, world_size, address, deadline, came, .. } = place;
    let Arrivals { ranks: came, n_strangers } = came.lock().map(|came| came.clone()).unwrap_or_default();
    let missing: Vec<String> =
        (0..*world_size).filter(|other| other != rank && !came.contains(other)).map(|r| r.to_string()).collect();
    let whom = match (*rank, missing.len()) {
        // Only who listens knows who has come.
        (0, 1) => format!("rank {}", missing[0]),
        (0, 2..=16) => format!("ranks {}", missing.join(", ")),
        (0, n) => format!("{n} other ranks"),
        _ => format!("the other {}", world_size - 1),
    };
    let strangers = match n_strangers {
        0 => String::new(),
        n => format!(
            "; {n} connections did not prove that they belong to the job: is BELLORA_TOKEN the same everywhere?"
        ),
    };
    format!(
        "rank {rank} of {world_size} waits at {address} for {whom}: {} s so far, {} s at most ({made_by} made this process a rank){strangers}",
        waited.as_secs(),
        deadline.as_secs()
    )
}

/// The ranks that have met, joined by what is fastest between them.
fn joined(tcp: Tcp, place: &Place, on_gpus: bool) -> Result<Box<dyn Communicator>> {
    // A rank sees one GPU alone.
    Ok(if on_gpus { Box::new(Nccl::new(tcp, Device::Cuda(0), place.timeout)?) } else { Box::new(tcp) })
}

/// The address of this machine by which it reaches another one.
pub(super) fn interface_towards(address: &str) -> Result<IpAddr> {
    let unknown = |error: std::io::Error| {
        Error::invalid("the rendezvous", format!("{address:?} leads nowhere: {error}"))
            .hint("write HOST:PORT, with a host that this machine knows")
    };
    let target: SocketAddr = address
        .to_socket_addrs()
        .map_err(unknown)?
        .next()
        .ok_or_else(|| Error::invalid("the rendezvous", format!("{address:?} has no address")))?;
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    // Nothing is sent: the system only says which way it would go.
    let socket = UdpSocket::bind(any).map_err(unknown)?;
    socket.connect(target).map_err(unknown)?;
    Ok(socket.local_addr().map_err(unknown)?.ip())
}
