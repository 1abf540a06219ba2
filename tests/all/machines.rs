//! Two machines: two network namespaces with a link between, which can be cut. Where the system allows none, as it may for
//! who is not root, two loopback addresses stand for them, between which there is nothing to cut.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::ranks::{FP32, kill, lab, nothing_is_left, ranks_of, same_to_rounding, says};
use crate::resume::{assert_same_run, checkpoint_steps, logged_steps, n_lines, step_dir, wait_until};
use crate::support::{Lab, Ran, bellora};

/// A port of its own: nothing else listens in a fresh namespace, nor, most likely, at these loopback addresses.
const PORT: u16 = 29_471;

/// Two machines; they go when this is dropped.
struct Machines {
    /// The names of their namespaces; none where there are only addresses.
    namespaces: Option<[String; 2]>,
    addresses: [&'static str; 2],
}

/// Calls `ip`; whether it did what was asked.
fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).output().is_ok_and(|output| output.status.success())
}

impl Machines {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let job = format!("bellora-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let names = ["a", "b"].map(|machine| format!("{job}-{machine}"));
        let mut machines = Self { namespaces: Some(names.clone()), addresses: ["10.77.0.1", "10.77.0.2"] };
        let [a, b] = &names;
        let mut steps = vec![format!("netns add {a}"), format!("netns add {b}")];
        steps.push(format!("-n {a} link add eth0 type veth peer name eth0 netns {b}"));
        for (name, address) in names.iter().zip(machines.addresses) {
            steps.push(format!("-n {name} address add {address}/24 dev eth0"));
            steps.extend(["lo", "eth0"].map(|device| format!("-n {name} link set {device} up")));
        }
        if !steps.iter().all(|step| ip(step)) {
            machines.remove();
            machines = Self { namespaces: None, addresses: ["127.0.0.2", "127.0.0.3"] };
        }
        machines
    }

    /// A command as it is on one of the machines.
    fn on(&self, machine: usize, command: &Command) -> Command {
        let Some(names) = &self.namespaces else {
            let mut same = Command::new(command.get_program());
            return copy(&mut same, command);
        };
        let mut there = Command::new("ip");
        there.args(["netns", "exec", &names[machine]]).arg(command.get_program());
        copy(&mut there, command)
    }

    /// Cuts the link between the machines at the end of one of them, or mends it.
    fn set_link(&self, machine: usize, state: &str) {
        let names = self.namespaces.as_ref().unwrap();
        assert!(ip(&format!("-n {} link set eth0 {state}", names[machine])));
    }

    /// Starts a command of two ranks on each machine.
    fn start(&self, lab: &Lab, command: impl Fn() -> Command) -> [Supervisor; 2] {
        let meet = format!("{}:{PORT}", self.addresses[0]);
        [0, 1].map(|machine| {
            let mut command = command();
            command.args(["--nproc", "2", "--nnodes", "2", "--node-rank", &machine.to_string()]);
            command.env("BELLORA_TOKEN", "a secret of this test");
            command.args(["--rendezvous", &meet, "--link-timeout", "2"]);
            if self.namespaces.is_none() {
                // The way from one loopback address to another begins at a third.
                command.args(["--interface", self.addresses[machine]]);
            }
            Supervisor::start(self.on(machine, &command), lab.path(&format!("log of machine {machine}")))
        })
    }

    fn remove(&mut self) {
        for name in self.namespaces.take().into_iter().flatten() {
            ip(&format!("netns del {name}"));
        }
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        self.remove();
    }
}

fn copy(to: &mut Command, from: &Command) -> Command {
    to.args(from.get_args());
    for (name, value) in from.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
    std::mem::replace(to, Command::new(""))
}

/// The process that starts a machine's ranks; killed, and they with it, if a test is over before.
pub(crate) struct Supervisor {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Supervisor {
    /// Starts it; what it says goes to a file, so that nobody has to read it meanwhile.
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Self {
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
        Self { child: command.spawn().unwrap(), log }
    }

    /// Waits for its end, which must come: what would only end after half an hour has not ended.
    #[track_caller]
    pub(crate) fn ended(mut self) -> Ran {
        let started = Instant::now();
        loop {
            let status = self.child.try_wait().unwrap();
            let stderr = String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned();
            if let Some(status) = status {
                return Ran { code: status.code(), stdout: String::new(), stderr };
            }
            assert!(started.elapsed() < Duration::from_secs(60), "it does not end: {stderr}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a job needs to be cut in its middle: some seconds of steps, and checkpoints.
const LONG: [&str; 3] = ["train.max_steps=60", "train.checkpoint_every=10", "train.eval_every=0"];

#[test]
fn a_job_on_two_machines_comes_out_the_same() {
    let (lab, machines) = (lab(), Machines::new());
    lab.run("train", &[], &[]).ok();
    let solo = lab.path("solo");
    std::fs::rename(lab.path("run"), &solo).unwrap();
    for supervisor in machines.start(&lab, || lab.command("train", &[], &[])) {
        supervisor.ended().ok();
    }
    same_to_rounding("two machines", &lab.path("run"), &solo, FP32);
}

#[test]
fn a_link_that_is_cut_ends_both_machines_and_the_job_goes_on_later() {
    let (lab, machines) = (lab(), Machines::new());
    if machines.namespaces.is_none() {
        eprintln!("not tried: this system allows no network namespaces, so there is no link to cut");
        return;
    }
    lab.run("train", &["--nproc", "4"], &LONG).ok();
    let (dir, straight) = (lab.path("run"), lab.path("straight"));
    std::fs::rename(&dir, &straight).unwrap();

    let mut supervisors = machines.start(&lab, || lab.command("train", &[], &LONG));
    wait_until(&mut supervisors[0].child, || n_lines(&dir) >= 25);
    machines.set_link(0, "down");
    for (supervisor, (first, lost)) in supervisors.into_iter().zip([(0, "10.77.0.2"), (2, "10.77.0.1")]) {
        let process = supervisor.child.id();
        let ran = supervisor.ended();
        assert_eq!(ran.code, Some(75), "{}", ran.stderr);
        let cause = format!("error: rank {first}: has lost another rank; it was at step ");
        let lost = format!(" at {lost}, or the link to it, is gone (");
        says(&ran, &[&cause, "the machine of rank ", &lost, "hint: see that the machine runs", "bellora resume"]);
        nothing_is_left(process);
    }
    assert!(n_lines(&dir) < 60, "they did not end because they were done");
    let newest = *checkpoint_steps(&dir).last().unwrap();
    bellora::checkpoint::manifest::verify(&step_dir(&dir, newest)).unwrap();

    machines.set_link(0, "up");
    let resume = || {
        let mut command = bellora();
        command.arg("resume").arg(&dir);
        command
    };
    for supervisor in machines.start(&lab, resume) {
        let ran = supervisor.ended().ok();
        assert!(ran.stderr.is_empty() || ran.stderr.contains(&format!("goes on from step {newest} of 60")), "{ran:?}");
    }
    assert_eq!(logged_steps(&dir), (1..=60).collect::<Vec<_>>());
    assert_same_run("cut and resumed", &dir, &straight);
    std::fs::rename(&dir, lab.path("resumed")).unwrap();

    // By itself, where the link is cut at the other machine's end, which then has no way to anywhere.
    let mut supervisors = machines.start(&lab, || lab.command("train", &["--max-restarts", "1"], &LONG));
    wait_until(&mut supervisors[0].child, || n_lines(&dir) >= 25);
    machines.set_link(1, "down");
    for supervisor in &mut supervisors {
        let log = supervisor.log.clone();
        wait_until(&mut supervisor.child, || {
            std::fs::read_to_string(&log).unwrap().contains("starting all ranks again, 1 of at most 1 times")
        });
    }
    machines.set_link(1, "up");
    for supervisor in supervisors {
        supervisor.ended().ok();
    }
    assert_same_run("cut and started again", &dir, &straight);
}

/// The system of a machine answers for a process that is stopped.
#[test]
fn a_rank_that_stands_still_is_not_lost() {
    let (lab, machines) = (lab(), Machines::new());
    let mut supervisors = machines.start(&lab, || lab.command("train", &[], &LONG));
    wait_until(&mut supervisors[0].child, || n_lines(&lab.path("run")) >= 10);
    let stopped = ranks_of(supervisors[1].child.id())[0];
    kill(stopped, "STOP");
    // Longer than it takes to find a link that is cut: after two seconds, and a third one for whole ones.
    std::thread::sleep(Duration::from_secs(4));
    kill(stopped, "CONT");
    for supervisor in supervisors {
        supervisor.ended().ok();
    }
}
