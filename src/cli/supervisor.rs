//! Starts the ranks of a job on this machine, joins their logs, and sees to it that they end together.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::ranks::{RankArgs, VISIBLE_GPUS, gpu_of, interface_towards, told};
use super::{say, signals};
use crate::comm::{Place, Rendezvous, fresh_token};
use crate::error::{Error, Fault, Result, STOP_SIGNALS};
use crate::run::checkpointing::{SAVED, SAVES};
use crate::run::requests::Requests;

/// How often signals and the watchdog are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long ranks that were asked to stop because another one failed may take.
const GRACE: Duration = Duration::from_secs(5);
/// How long the rank that others have lost may take to end by itself.
const CAUSE: Duration = Duration::from_secs(1);
/// What even a slow disk, or a network's, takes in a second; a checkpoint that is being written has so much time.
const SLOWEST_BYTES_A_SEC: u64 = 20_000_000;
/// Lines of a rank that are kept for the report.
const LAST_LINES: usize = 12;
/// How a rank says on its standard output that it only ended because another one did.
pub(super) const FOLLOWS_ANOTHER: &str = "follows another";

/// Runs a job's ranks on this machine to their end.
///
/// # Errors
/// The first failure, with the last lines of the rank that failed; [`Error::Interrupted`].
pub(super) fn supervise(args: &RankArgs, nproc: usize, can_resume: bool) -> Result<()> {
    let requests = signals::listen_for_run()?;
    requests.ends_at_once.store(false, Ordering::SeqCst);
    // Asked once: while the network is away, which a job may outlive, there is no way to the rendezvous.
    let interface = match (&args.rendezvous, args.interface) {
        (None, _) => Place::LOOPBACK,
        (Some(_), Some(interface)) => interface,
        (Some(address), None) => interface_towards(address)?,
    };
    let mut restarts = 0;
    loop {
        let mut job = SupervisedJob::start(args, nproc, interface, can_resume && restarts > 0)?;
        let ended = job.watch(args, &requests);
        match ended {
            Err(error) if restarts < args.max_restarts && is_worth_another_try(&error) => {
                restarts += 1;
                for fault in error.faults() {
                    say(&format!("error: {fault}\n"));
                }
                say(&format!("starting all ranks again, {restarts} of at most {} times\n", args.max_restarts));
            }
            ended => return ended,
        }
    }
}

/// A config that is refused, or a user who wants the job to stop, would only come again.
fn is_worth_another_try(error: &Error) -> bool {
    matches!(error, Error::Job { exit_code, .. } if *exit_code != 2)
}

/// What the supervisor learns of a rank.
enum Event {
    /// A line of its log.
    Line(usize, String),
    /// How far it is.
    Status(usize, String),
    /// Its end.
    Ended(usize, ExitStatus),
}

/// A rank as the supervisor sees it.
struct RankProcess {
    rank: usize,
    group: Pid,
    last_lines: VecDeque<String>,
    status: String,
    since: Instant,
    follows_another: bool,
    /// When a checkpoint that it is writing should be on the disk at the latest.
    writes_until: Option<Instant>,
    ended: Option<ExitStatus>,
}

struct SupervisedJob {
    ranks: Vec<RankProcess>,
    /// The signal to stop that was handed on to the ranks; 0 before.
    asked: i32,
    events: Receiver<Event>,
    rendezvous: Option<Rendezvous>,
}

impl SupervisedJob {
    fn start(args: &RankArgs, nproc: usize, interface: IpAddr, resumes: bool) -> Result<Self> {
        let world_size = nproc * args.nnodes;
        let meet = Duration::from_secs(args.meet_timeout);
        let token = std::env::var(told::TOKEN).unwrap_or_default();
        let token = match (token.is_empty(), args.nnodes) {
            (false, _) => token,
            (true, 1) => fresh_token()?,
            _ => {
                return Err(Error::invalid(
                    told::TOKEN,
                    "several machines know each other by a secret, and there is none",
                )
                .hint("set BELLORA_TOKEN to the same random text on all machines"));
            }
        };
        let listen_at = |at| Rendezvous::listen_at(at, world_size, token.as_bytes(), meet, Arc::default());
        let (rendezvous, address) = match &args.rendezvous {
            None => {
                let rendezvous = listen_at(SocketAddr::new(interface, 0))?;
                let address = rendezvous.address().to_string();
                (Some(rendezvous), address)
            }
            Some(address) if args.node_rank == 0 => {
                (Some(listen_at(own_address(address, interface, args.interface.is_some())?)?), address.clone())
            }
            Some(address) => (None, address.clone()),
        };
        let (sender, events) = channel();
        let mut job = Self { ranks: Vec::new(), asked: 0, events, rendezvous };
        for local in 0..nproc {
            let rank = args.node_rank * nproc + local;
            let mut command = Command::new(
                std::env::current_exe()
                    .map_err(|error| Error::failed("this program", format!("cannot find itself: {error}")))?,
            );
            command.args(std::env::args_os().skip(1));
            if resumes {
                command.arg("--resume");
            }
            command
                .env(told::RANK, rank.to_string())
                .env(told::WORLD_SIZE, world_size.to_string())
                .env(told::LOCAL_WORLD_SIZE, nproc.to_string())
                .env(told::RENDEZVOUS, &address)
                .env(told::INTERFACE, interface.to_string())
                .env(told::MEET_TIMEOUT, args.meet_timeout.to_string())
                .env(told::TIMEOUT, args.collective_timeout().as_secs().to_string())
                .env(told::LINK_TIMEOUT, args.link_timeout.to_string())
                .env(told::TOKEN, &token)
                .env(told::SUPERVISOR, std::process::id().to_string())
                // On CPUs there may be more ranks than GPUs: these see none.
                .env(VISIBLE_GPUS, gpu_of(local).unwrap_or_default())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                // A group of its own: a Ctrl-C at the terminal reaches the supervisor alone, who hands it on once.
                .process_group(0);
            if std::env::var_os("OMP_NUM_THREADS").is_none() {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                command.env("OMP_NUM_THREADS", (cores / nproc).max(1).to_string());
            }
            let child = command
                .spawn()
                .map_err(|error| Error::failed(format!("rank {rank}"), format!("cannot be started: {error}")))?;
            job.ranks.push(RankProcess::new(rank, &child));
            follow(rank, child, &sender)?;
        }
        Ok(job)
    }

    /// Hands logs and signals on until all ranks have ended.
    fn watch(&mut self, args: &RankArgs, requests: &Requests) -> Result<()> {
        let (mut stopping, mut progress) = (None::<Instant>, Instant::now());
        let mut verdict: Option<Error> = None;
        let mut to_stop_at = None::<Instant>;
        while self.ranks.iter().any(|rank| rank.ended.is_none()) {
            match self.events.recv_timeout(LOOK) {
                Ok(Event::Line(rank, line)) => self.line(rank, line),
                Ok(Event::Status(rank, status)) => {
                    progress = Instant::now();
                    self.rank(rank).told(status, progress);
                }
                Ok(Event::Ended(rank, status)) => {
                    progress = Instant::now();
                    self.rank(rank).ended = Some(status);
                    // One that was asked to stop leaves the others as it found them: at the end of the same step.
                    if !status.success() && self.stop_of(status).is_none() {
                        // One that has lost another is ahead of the cause, which may be about to end by itself.
                        let is_cause = !self.rank(rank).follows_another;
                        let at = if is_cause { progress } else { progress + CAUSE };
                        to_stop_at = Some(to_stop_at.map_or(at, |before| before.min(at)));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if stopping.is_none() && to_stop_at.is_some_and(|at| at <= Instant::now()) {
                self.signal(Signal::TERM);
                stopping = Some(Instant::now());
            }
            let asked = requests.stop.load(Ordering::SeqCst) as i32;
            if asked != self.asked {
                self.asked = asked;
                self.signal(signal_of(asked));
            }
            if requests.save.swap(false, Ordering::SeqCst) {
                self.signal(Signal::USR1);
            }
            let hang = Duration::from_secs(args.hang_timeout);
            if !hang.is_zero() && progress.elapsed() > hang && stopping.is_none() {
                verdict = Some(self.hung(args.hang_timeout));
                self.signal(Signal::TERM);
                stopping = Some(Instant::now());
            }
            if stopping.is_some_and(|since| since.elapsed() > GRACE) {
                self.kill_those_who_write_nothing();
            }
        }
        // What the ranks said last may stand in the channel still.
        while let Ok(event) = self.events.recv_timeout(LOOK) {
            match event {
                Event::Line(rank, line) => self.line(rank, line),
                Event::Status(rank, status) => self.rank(rank).told(status, Instant::now()),
                Event::Ended(..) => {}
            }
        }
        verdict.map_or_else(|| self.verdict(), Err)
    }

    fn rank(&mut self, rank: usize) -> &mut RankProcess {
        let first = self.ranks[0].rank;
        &mut self.ranks[rank - first]
    }

    fn line(&mut self, rank: usize, line: String) {
        say(&format!("[rank {rank}] {line}\n"));
        let last_lines = &mut self.rank(rank).last_lines;
        if last_lines.len() == LAST_LINES {
            last_lines.pop_front();
        }
        last_lines.push_back(line);
    }

    /// Sends a signal to every rank that has not ended, and to whatever it has started.
    fn signal(&self, signal: Signal) {
        for rank in self.ranks.iter().filter(|rank| rank.ended.is_none()) {
            // A group that is gone already is what is wanted.
            let _ = kill_process_group(rank.group, signal);
        }
    }

    /// Ends every rank but one that is writing a checkpoint, whose time is not up: what it writes is the newest state of the run.
    fn kill_those_who_write_nothing(&self) {
        let now = Instant::now();
        let writes = |rank: &&RankProcess| rank.writes_until.is_some_and(|until| now < until);
        for rank in self.ranks.iter().filter(|rank| rank.ended.is_none() && !writes(rank)) {
            let _ = kill_process_group(rank.group, Signal::KILL);
        }
    }

    /// What the ranks' ends amount to.
    fn verdict(&self) -> Result<()> {
        let failed = |rank: &&RankProcess| rank.ended.is_some_and(|status| !status.success());
        let mut failures: Vec<&RankProcess> = self.ranks.iter().filter(failed).collect();
        if failures.is_empty() {
            return Ok(());
        }
        let stop_of = |rank: &RankProcess| rank.ended.and_then(|status| self.stop_of(status));
        let stop = stop_of(failures[0]);
        if let Some(signal) = stop.filter(|_| failures.iter().all(|rank| stop_of(rank) == stop)) {
            let has_begun = failures.iter().any(|rank| !rank.status.is_empty());
            let note = if has_begun { "all ranks have ended in good order" } else { "no rank had begun" };
            return Err(Error::Interrupted { signal, note: note.into() });
        }
        // A rank that lost another one is not the cause, nor is one that was killed for being slow to stop.
        failures.sort_by_key(|rank| (rank.follows_another, rank.ended.is_some_and(|s| s.signal() == Some(15))));
        let cause = failures[0];
        let exit_code = cause.ended.and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
        let mut what = match cause.follows_another {
            // None of this machine's is the cause.
            true => "has lost another rank".to_owned(),
            false => cause.ended.map(shown).unwrap_or_default(),
        };
        if !cause.status.is_empty() {
            what.push_str(&format!("; it was at {}", cause.status));
        }
        if !cause.last_lines.is_empty() {
            what.push_str("; its last lines:");
            cause.last_lines.iter().for_each(|line| what.push_str(&format!("\n    {line}")));
        }
        let has_begun = self.ranks.iter().any(|rank| !rank.status.is_empty());
        Err(job_failed(exit_code.unwrap_or(1), has_begun, format!("rank {}", cause.rank), what))
    }

    /// The signal that a rank says it has stopped by, in good order; or that has ended it because it had not begun when it was
    /// handed on.
    fn stop_of(&self, status: ExitStatus) -> Option<i32> {
        match status.code() {
            Some(code) => STOP_SIGNALS.into_iter().map(|signal| signal as i32).find(|signal| *signal == code - 128),
            None => status.signal().filter(|signal| *signal == self.asked),
        }
    }

    /// Where every rank stands when none has got on for too long.
    fn hung(&self, seconds: u64) -> Error {
        let mut what = format!("no rank has got on for {seconds} s; they are stopped. Where they stand:");
        for rank in &self.ranks {
            let at = if rank.status.is_empty() { "not begun" } else { &rank.status };
            what.push_str(&format!("\n    rank {}: {at}, for {} s", rank.rank, rank.since.elapsed().as_secs()));
        }
        job_failed(1, true, "the job".into(), what)
    }
}

impl Drop for SupervisedJob {
    /// Leaves nothing behind, however the supervisor came to its end.
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        drop(self.rendezvous.take());
    }
}

impl RankProcess {
    fn new(rank: usize, child: &Child) -> Self {
        Self {
            rank,
            group: Pid::from_child(child),
            last_lines: VecDeque::new(),
            status: String::new(),
            since: Instant::now(),
            follows_another: false,
            writes_until: None,
            ended: None,
        }
    }

    /// Takes down what the rank says of itself.
    fn told(&mut self, status: String, now: Instant) {
        if status == FOLLOWS_ANOTHER {
            self.follows_another = true;
        } else if status == SAVED {
            self.writes_until = None;
        } else if let Some(bytes) = status.strip_prefix(SAVES) {
            let secs = bytes.trim().parse::<u64>().unwrap_or_default() / SLOWEST_BYTES_A_SEC;
            self.writes_until = Some(now + GRACE + Duration::from_secs(secs));
        } else {
            (self.status, self.since) = (status, now);
        }
    }
}

fn job_failed(exit_code: u8, has_begun: bool, place: String, what: String) -> Error {
    let hint = match (exit_code, has_begun) {
        (2, _) => "",
        (_, false) => "see to the cause and start the job again, by the same command on every machine",
        (_, true) => {
            "see to the cause and go on from the newest checkpoint, by `bellora resume` or --resume with the same options"
        }
    };
    Error::Job { exit_code, fault: Fault::new(place, what).hint(hint) }
}

/// Reads what a rank says and waits for its end, in threads of their own.
fn follow(rank: usize, mut child: Child, events: &Sender<Event>) -> Result<()> {
    let no_thread =
        |error: std::io::Error| Error::failed(format!("rank {rank}"), format!("no thread to follow it: {error}"));
    let (stderr, stdout) = (child.stderr.take(), child.stdout.take());
    let lines = forward(stderr, rank, events.clone(), Event::Line).map_err(no_thread)?;
    let statuses = forward(stdout, rank, events.clone(), Event::Status).map_err(no_thread)?;
    let events = events.clone();
    let wait = move || {
        let status = child.wait();
        // Everything that the rank said comes before its end.
        let _ = lines.join();
        let _ = statuses.join();
        if let Ok(status) = status {
            let _ = events.send(Event::Ended(rank, status));
        }
    };
    std::thread::Builder::new().name(format!("rank {rank}")).spawn(wait).map_err(no_thread)?;
    Ok(())
}

fn forward(
    pipe: Option<impl Read + Send + 'static>,
    rank: usize,
    events: Sender<Event>,
    event: fn(usize, String) -> Event,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(format!("log of rank {rank}")).spawn(move || {
        let Some(pipe) = pipe else { return };
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if events.send(event(rank, text)).is_err() {
                return;
            }
            line.clear();
        }
    })
}

fn signal_of(number: i32) -> Signal {
    match number {
        1 => Signal::HUP,
        2 => Signal::INT,
        _ => Signal::TERM,
    }
}

fn shown(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(9)) => "was killed (SIGKILL): by hand, or by the system for want of memory".to_owned(),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or_default()),
    }
}

/// The address to listen at: that of the rendezvous; where another machine hands its port on, the interface that was named.
fn own_address(address: &str, interface: IpAddr, is_named: bool) -> Result<SocketAddr> {
    let target = address.to_socket_addrs().ok().and_then(|mut targets| targets.next());
    let target = target.ok_or_else(|| {
        Error::invalid("--rendezvous", format!("{address:?} is no address")).hint("write HOST:PORT of machine 0")
    })?;
    // The system takes an address for a socket's own if this machine has it.
    if UdpSocket::bind((target.ip(), 0)).is_ok() {
        return Ok(target);
    }
    if is_named {
        return Ok(SocketAddr::new(interface, target.port()));
    }
    let what = format!("{} is no address of this machine, which is machine 0", target.ip());
    Err(Error::invalid("--rendezvous", what).hint(format!(
        "name one that the others reach, such as {interface}; where another machine hands the port on to this one, add \
         --interface {interface}"
    )))
}
