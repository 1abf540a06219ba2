//! Processes that are to be one job and do not come together: each ends within its deadline, says what is wrong, where and how
//! to mend it, and leaves the run as it was.

use std::net::TcpListener;
use std::path::PathBuf;

use crate::machines::Supervisor;
use crate::ranks::{kill, lab, nothing_is_left, ranks_of, says};
use crate::resume::{assert_same_folder, copy_folder, wait_until};
use crate::support::{Lab, bellora};

/// One of the processes, and how it is to end. `PORT` in its arguments and words is where they meet.
struct Process<'a> {
    environment: &'a [(&'a str, &'a str)],
    arguments: &'a str,
    code: i32,
    says: &'a [&'a str],
}

/// On machine 0 or 1 of two, with one rank.
fn on_machine<'a>(arguments: &'a str, says: &'a [&'a str]) -> Process<'a> {
    Process { environment: &[], arguments, code: 1, says }
}

/// One of a job that another program has started.
fn by_environment<'a>(environment: &'a [(&'a str, &'a str)], code: i32, says: &'a [&'a str]) -> Process<'a> {
    Process { environment, arguments: "", code, says }
}

/// A run that is to go on.
struct Run {
    lab: Lab,
    dir: PathBuf,
    before: PathBuf,
}

impl Run {
    fn new() -> Self {
        let lab = lab().with(&["train.max_steps=2", "train.checkpoint_every=2", "train.eval_every=0"]);
        lab.run("train", &[], &[]).ok();
        let (dir, before) = (lab.path("run"), lab.path("before"));
        copy_folder(&dir, &before);
        Self { lab, dir, before }
    }

    /// Starts processes one after another, and holds the end of each, and of the run, against what is expected.
    #[track_caller]
    fn fails(&self, port: u16, processes: &[Process<'_>]) {
        let started: Vec<Supervisor> =
            (0..).zip(processes).map(|(at, process)| self.start(port, at, process)).collect();
        for (started, Process { code, says: words, .. }) in started.into_iter().zip(processes) {
            let process = started.child.id();
            let ran = started.ended();
            assert_eq!(ran.code, Some(*code), "{}", ran.stderr);
            let words: Vec<String> = words.iter().map(|words| words.replace("PORT", &port.to_string())).collect();
            says(&ran, &words.iter().map(String::as_str).chain(["hint: "]).collect::<Vec<_>>());
            nothing_is_left(process);
        }
        assert_same_folder("the run", &self.dir, &self.before);
    }

    fn start(&self, port: u16, at: usize, process: &Process<'_>) -> Supervisor {
        let mut command = bellora();
        command.arg("resume").arg(&self.dir).args(["--set", "train.max_steps=4"]);
        command.args(process.arguments.replace("PORT", &port.to_string()).split_whitespace());
        command.env_remove("CUDA_VISIBLE_DEVICES");
        command.env("BELLORA_TOKEN", "a secret of this test").env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).envs(process.environment.iter().copied());
        Supervisor::start(command, self.lab.path(&format!("log {at}")))
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

const FIRST: &str = "--nnodes 2 --node-rank 0 --rendezvous 127.0.0.1:PORT";
const SECOND: &str = "--nnodes 2 --node-rank 1 --rendezvous 127.0.0.1:PORT";
const AT: &str = "the rendezvous at 127.0.0.1:PORT: ";

#[test]
fn a_port_that_is_another_s_or_nobody_s() {
    let run = Run::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let words = ["error: 127.0.0.1:PORT: cannot listen there: ", "in use", "the same for all ranks"];
    run.fails(port, &[on_machine(FIRST, &words)]);
    let words = [AT, "took the connection and said nothing until the deadline"];
    run.fails(port, &[on_machine(&format!("{SECOND} --meet-timeout 1"), &words)]);
    drop(taken);
    let words = ["cannot be reached within 1 s: Connection refused", "start machine 0", "start the job again"];
    run.fails(port, &[on_machine(&format!("{SECOND} --meet-timeout 1"), &words)]);
}

#[test]
fn ranks_that_are_missing_or_hold_another_token() {
    let run = Run::new();
    // Long enough for both to come on a busy machine.
    let first = format!("{FIRST} --meet-timeout 5");
    let missing = ["1 of 2 ranks came before the deadline (5 s); missing: rank 1", "did not prove that they belong"];
    let other = Process {
        environment: &[("BELLORA_TOKEN", "another")],
        arguments: SECOND,
        code: 1,
        says: &[AT, "what listens there does not hold this job's token", "the same BELLORA_TOKEN"],
    };
    run.fails(free_port(), &[on_machine(&first, &missing), other]);
    let second = format!("{SECOND} --nproc 2");
    let none = Process {
        environment: &[("BELLORA_TOKEN", "")],
        arguments: &second,
        code: 2,
        says: &["error: BELLORA_TOKEN: ", "there is none", "the same random text"],
    };
    run.fails(free_port(), &[none]);
}

#[test]
fn machines_that_are_told_different_jobs() {
    let run = Run::new();
    // One of the two ranks of the second machine says it.
    let words = ["says that the job has 4 ranks, this listener was told 2", "the same --nnodes and --nproc"];
    run.fails(free_port(), &[on_machine(FIRST, &words), on_machine(&format!("{SECOND} --nproc 2"), &words)]);
    let (first, second) = (FIRST.replace("--nnodes 2", "--nnodes 3"), SECOND.replace("--nnodes 2", "--nnodes 3"));
    let words = [AT, "rank 1 has come twice: from 127.0.0.1:", "its own --node-rank"];
    run.fails(free_port(), &[&first, &second, &second].map(|arguments| on_machine(arguments, &words)));
    let elsewhere = Process {
        environment: &[],
        arguments: "--nnodes 2 --rendezvous 192.0.2.1:PORT",
        code: 2,
        says: &["error: --rendezvous: 192.0.2.1 is no address of this machine", "--interface"],
    };
    run.fails(free_port(), &[elsewhere]);
}

#[test]
fn places_in_the_environment_that_cannot_be() {
    let run = Run::new();
    for (environment, words) in [
        (
            &[("RANK", "5"), ("WORLD_SIZE", "2")][..],
            ["error: RANK: expected less than WORLD_SIZE 2, found 5", "from 0"],
        ),
        (&[("RANK", "1"), ("WORLD_SIZE", "1")], ["error: RANK: expected less than WORLD_SIZE 1, found 1", "from 0"]),
        (&[("RANK", "one"), ("WORLD_SIZE", "2")], ["error: RANK: expected a number, found \"one\"", "unset it"]),
        (
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", "7")],
            [
                "error: SLURM_PROCID: says that this is rank 0 of 2, but SLURM_STEP_ID names no step of srun",
                "`srun bellora train",
            ],
        ),
        // An interactive shell of salloc.
        (
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", "7"), ("SLURM_STEP_ID", "4294967290")],
            [
                "error: SLURM_PROCID: says that this is rank 0 of 2, but SLURM_STEP_ID names no step of srun",
                "`srun bellora train",
            ],
        ),
        // Left over in the shell that mpirun was called from.
        (
            &[("RANK", "0"), ("WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")],
            [
                "error: WORLD_SIZE: says that the job has 4 ranks, and OMPI_COMM_WORLD_SIZE says 2",
                "unset RANK and WORLD_SIZE",
            ],
        ),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "1"), ("SLURM_PROCID", "1"), ("SLURM_NTASKS", "3"), ("SLURM_STEP_ID", "0")],
            ["error: WORLD_SIZE: says that the job has 1 ranks, and SLURM_NTASKS says 3", "unset RANK and WORLD_SIZE"],
        ),
        (&[("RANK", "0")], ["error: WORLD_SIZE: is not set, and RANK is", "set both, or unset RANK"]),
        (&[("WORLD_SIZE", "2")], ["error: RANK: is not set, and WORLD_SIZE is", "set both, or unset WORLD_SIZE"]),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "")],
            ["says that this is rank 0 of 2, and nothing says where they meet", "a free port"],
        ),
        (
            &[("TORCHELASTIC_RUN_ID", "none"), ("RANK", "0"), ("WORLD_SIZE", "2"), ("BELLORA_TOKEN", "")],
            ["error: BELLORA_TOKEN: ", "--rdzv-id"],
        ),
    ] {
        run.fails(free_port(), &[by_environment(environment, 2, &words)]);
    }
    let twice = [AT, "rank 1 has come twice: from 127.0.0.1:", "its own RANK"];
    let rank = |rank| [("RANK", rank), ("WORLD_SIZE", "3")];
    let (zero, one) = (rank("0"), rank("1"));
    run.fails(
        free_port(),
        &[by_environment(&zero, 1, &twice), by_environment(&one, 1, &twice), by_environment(&one, 1, &twice)],
    );
}

/// Inside an allocation of SLURM mpirun's word counts, and so does torchrun's: there SLURM's tasks are machines.
#[test]
fn a_process_that_waits_says_who_it_is_and_for_whom() {
    let run = Run::new();
    let slurm = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1"), ("SLURM_STEP_ID", "0"), ("SLURM_JOB_ID", "7")];
    for (job, words) in [
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2")][..],
            "rank 0 of 2 waits at 127.0.0.1:PORT for rank 1: 0 s so far, 600 s at most (RANK and WORLD_SIZE made this process a rank)",
        ),
        (
            &[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "3")],
            "rank 2 of 3 waits at 127.0.0.1:PORT for the other 2: 0 s so far, 600 s at most (OMPI_COMM_WORLD_RANK and",
        ),
        (&[("PMI_RANK", "0"), ("PMI_SIZE", "3")], "rank 0 of 3 waits at 127.0.0.1:PORT for ranks 1, 2: "),
    ] {
        let environment: Vec<_> = job
            .iter()
            .chain(&slurm)
            .copied()
            .filter(|(name, _)| job[0].0 != "RANK" || !name.starts_with("SLURM"))
            .collect();
        let port = free_port();
        let mut rank = run.start(port, 0, &by_environment(&environment, 1, &[]));
        let words = words.replace("PORT", &port.to_string());
        let log = run.lab.path("log 0");
        wait_until(&mut rank.child, || std::fs::read_to_string(&log).is_ok_and(|said| said.contains(&words)));
    }
}

/// A rank that waits for others has nothing to save yet: the signal ends it, and is no failure of its own.
#[test]
fn a_job_that_waits_for_another_machine_can_be_stopped() {
    let run = Run::new();
    let mut job = run.start(free_port(), 0, &on_machine(SECOND, &[]));
    let supervisor = job.child.id();
    wait_until(&mut job.child, || !ranks_of(supervisor).is_empty());
    kill(supervisor, "TERM");
    let ran = job.ended();
    assert_eq!(ran.code, Some(143), "{}", ran.stderr);
    assert!(ran.stderr.starts_with("error: stopped by SIGTERM: "), "{}", ran.stderr);
    nothing_is_left(supervisor);
}

/// Where no supervisor puts a rank in front of the lines, the rank does; and what all ranks of a machine are given is found
/// fault with once.
#[test]
fn one_rank_of_a_machine_speaks_of_a_config_at_fault() {
    let run = Run::new();
    for (launcher, local) in [
        (["RANK", "WORLD_SIZE"], "LOCAL_RANK"),
        (["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], "OMPI_COMM_WORLD_LOCAL_RANK"),
    ] {
        for (rank, local_rank) in [("2", "0"), ("3", "1")] {
            let mut command = bellora();
            command.arg("resume").arg(&run.dir).args(["--set", "lora.r=0"]);
            let ran = crate::support::run(command.env(launcher[0], rank).env(launcher[1], "4").env(local, local_rank));
            assert_eq!(ran.code, Some(2), "{}", ran.stderr);
            if local_rank == "0" {
                says(&ran, &["[rank 2] error: ", "lora.r", "\n[rank 2]   hint: "]);
            } else {
                assert_eq!(ran.stderr, "");
            }
        }
    }
}

/// torchrun shows every process all GPUs; one that waits for the others shows here which it was left with.
#[test]
fn a_rank_of_torchrun_takes_the_gpu_of_its_own() {
    let run = Run::new();
    for (visible, gpu) in [(None, "1"), (Some("4,7"), "7"), (Some("6"), "6"), (Some(""), "")] {
        let job = [("TORCHELASTIC_RUN_ID", "a job"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")];
        let environment: Vec<_> = job.into_iter().chain(visible.map(|gpus| ("CUDA_VISIBLE_DEVICES", gpus))).collect();
        let port = free_port();
        // torchrun's own port is the one below.
        let mut rank = run.start(port - 1, 0, &by_environment(&environment, 1, &[]));
        let environ = format!("/proc/{}/environ", rank.child.id());
        let has_gpu = || {
            let now = std::fs::read(&environ).unwrap();
            let is_its_own = |variable: &[u8]| variable == format!("CUDA_VISIBLE_DEVICES={gpu}").as_bytes();
            // The program has been started again with what libraries read.
            now.split(|&byte| byte == 0).any(is_its_own) && now.windows(16).any(|name| name == b"OMP_WAIT_POLICY=")
        };
        wait_until(&mut rank.child, has_gpu);
    }
}
