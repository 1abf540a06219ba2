//! A job on several processes: the same updates to rounding, one fate for all of them, and nothing left behind.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bellora::comm::{Place, Rendezvous, Tcp};
use bellora::engine::step::Trainer;
use bellora::eval::evaluate;
use serde_json::Value;

use crate::resume::{
    assert_same_run, checkpoint_steps, copy_folder, ended, logged_steps, n_lines, signal, step_dir, wait_until,
};
use crate::support::{
    Lab, Ran, Rig, Shape, assert_tensors_close, bellora, metrics, read_tensors, run, trainer_of_rank,
};

const SETS: [&str; 6] = [
    "lora.dropout=0.1",
    "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]",
    "train.global_batch=5",
    "train.micro_batch_tokens=320",
    "train.max_steps=12",
    "train.checkpoint_every=6",
];

pub(crate) fn lab() -> Lab {
    // 18 samples, five an update: the last of an epoch has three.
    Lab::new(Shape::default()).with(&SETS).with(&[
        "data.shuffle=true",
        "data.validation_fraction=0.2",
        "train.eval_every=4",
    ])
}

/// Trains on so many processes; one thread each, as everywhere here.
fn train(lab: &Lab, name: &str, nproc: usize, more: &[&str]) -> PathBuf {
    let dir = lab.path(name);
    let output = format!("train.output={}", dir.display());
    lab.run("train", &["--nproc", &nproc.to_string()], &[&[&*output], more].concat()).ok();
    dir
}

/// How long ranks in threads of the test wait for each other.
const MEET: Duration = Duration::from_secs(60);

fn numbers(dir: &Path, key: &str) -> Vec<f64> {
    metrics(dir).iter().filter_map(|line| line.get(key).and_then(Value::as_f64)).collect()
}

/// Holds a run against the one of a single process.
#[track_caller]
pub(crate) fn same_to_rounding(what: &str, ours: &Path, judge: &Path, bound: f64) {
    for key in ["loss", "grad_norm", "eval_loss"] {
        let (ours, judge) = (numbers(ours, key), numbers(judge, key));
        assert_eq!(ours.len(), judge.len(), "{what}: {key}");
        let off = ours.iter().zip(&judge).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
        println!("{what}: {key} differs by {off:.1e} at most");
        assert!(off <= bound, "{what}: {key} differs by {off:.1e}");
    }
    for key in ["lr", "samples", "tokens", "label_tokens"] {
        assert_eq!(numbers(ours, key), numbers(judge, key), "{what}: {key}");
    }
}

/// fp32 sums in another order; the losses of a small model move by a few of their last digits in a dozen updates.
pub(crate) const FP32: f64 = 1e-6;

#[test]
fn ranks_change_nothing_but_rounding() {
    let lab = lab();
    let solo = train(&lab, "solo", 1, &[]);
    for (nproc, shard) in [(2, "auto"), (3, "false"), (4, "false"), (2, "true"), (3, "true"), (4, "true")] {
        let what = format!("{nproc} ranks, shard = {shard}");
        let ours = train(&lab, &what, nproc, &[&format!("train.shard={shard}")]);
        same_to_rounding(&what, &ours, &solo, FP32);
        assert_eq!(checkpoint_steps(&ours), checkpoint_steps(&solo), "{what}");
        let adapter = "adapter/adapter_model.safetensors";
        let (ours, judge) = (read_tensors(&ours.join(adapter)), read_tensors(&solo.join(adapter)));
        // AdamW divides by the root of small moments: an element whose gradient is next to nothing may differ by more.
        assert_tensors_close(&what, &ours.into_iter().collect::<Vec<_>>(), &judge, 1e-3);
    }
}

/// Two runs that do the same from start to end, and where a run may go on that has done half of its steps.
fn moves_between_ranks(lab: &Lab, sets: &[&str]) {
    let two = train(lab, "two", 2, sets);
    assert_same_run("again on two ranks", &train(lab, "again", 2, sets), &two);
    // From the middle on: with as many ranks the same bits, with another number the same to rounding.
    for nproc in [2, 1, 3] {
        let dir = lab.path(&format!("from the middle on {nproc}"));
        copy_folder(&two, &dir);
        std::fs::remove_dir_all(dir.join("adapter")).unwrap();
        std::fs::remove_dir_all(step_dir(&dir, 12)).unwrap();
        let ran = run(bellora().arg("resume").arg(&dir).args(["--nproc", &nproc.to_string()])).ok();
        assert!(ran.stderr.contains("goes on from step 6 of 12"), "{}", ran.stderr);
        match nproc {
            2 => assert_same_run("resumed on two ranks", &dir, &two),
            _ => {
                says(&ran, &["the steps before on cpu with 1 thread on each of 2 ranks", "not bit for bit"]);
                same_to_rounding(&format!("resumed on {nproc} ranks"), &dir, &two, FP32);
            }
        }
    }
}

#[test]
fn the_same_ranks_give_the_same_bits_and_a_run_moves_between_them() {
    moves_between_ranks(&lab(), &[]);
}

#[test]
fn a_run_with_a_sharded_optimizer_moves_between_ranks_as_well() {
    moves_between_ranks(&lab(), &["train.shard=true"]);
}

/// Who updates a parameter does not matter, but for the order in which the squares of the norm are added up: without clipping
/// not a bit of an update depends on it.
#[test]
fn a_sharded_optimizer_does_the_same_updates() {
    for dtype in ["fp32", "bf16", "fp16"] {
        let dtype_set = format!("model.dtype={dtype}");
        let lab = lab().with(&[&*dtype_set, "train.max_grad_norm=0", "train.eval_every=6"]);
        let whole = train(&lab, "whole", 3, &["train.shard=false"]);
        let sharded = train(&lab, "sharded", 3, &["train.shard=true"]);
        let log = std::fs::read_to_string(sharded.join("train.log")).unwrap();
        assert!(log.contains("3 ranks share each update, and the optimizer's state"), "{dtype}: {log}");
        for key in ["loss", "eval_loss"] {
            assert_eq!(numbers(&sharded, key), numbers(&whole, key), "{dtype}: {key}");
        }
        for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
            let [ours, theirs] = [&sharded, &whole].map(|dir| std::fs::read(step_dir(dir, 12).join(file)).unwrap());
            assert!(ours == theirs, "{dtype}: {file} differs");
        }
    }
}

/// Calls `each` with a rank's trainer and its number, on threads of this process; gives what they return in their order.
pub(crate) fn on_ranks<R: Send>(lab: &Lab, n_ranks: usize, each: impl Fn(usize, &mut Rig) -> R + Sync) -> Vec<R> {
    let rendezvous = Rendezvous::listen(Place::LOOPBACK, n_ranks, b"token", MEET).unwrap();
    // What they begin with is drawn by a generator that a process has only one of.
    let turn = Mutex::new(());
    let rank = |rank: usize| {
        let mut trainer = {
            let _mine = turn.lock().unwrap();
            trainer_of_rank(lab.config(&[]), rank, n_ranks)
        };
        let (address, interface, token) = (rendezvous.address().to_string(), Place::LOOPBACK, b"token".to_vec());
        let (world_size, deadline, timeout, link_timeout) = (n_ranks, MEET, MEET, MEET);
        let place = Place {
            rank,
            world_size,
            address,
            interface,
            token,
            deadline,
            timeout,
            link_timeout,
            came: Arc::default(),
        };
        trainer.ranks = Box::new(Tcp::join(&place).unwrap());
        each(rank, &mut trainer)
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..n_ranks).map(|at| scope.spawn(move || rank(at))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_with_other_parameters_is_found_before_anything_is_saved() {
    for dtype in ["fp32", "bf16"] {
        let lab = lab().with(&[&*format!("model.dtype={dtype}")]);
        let said = on_ranks(&lab, 3, |rank, trainer| {
            for _ in 0..2 {
                trainer.step().unwrap();
                trainer.compare_with_other_ranks().unwrap();
            }
            if rank == 2 {
                let last = trainer.params.master().unwrap().get(-1);
                last.shallow_clone().copy_(&(&last + 1e-7));
            }
            trainer.compare_with_other_ranks().unwrap_err().to_string()
        });
        for said in said {
            assert_eq!(
                said, "step 2: rank 2 has other parameters than rank 0: nothing is saved from here on",
                "{dtype}"
            );
        }
    }
}

#[test]
fn an_evaluation_counts_every_sample_once_whatever_ranks_hold_at_a_time() {
    let lab = lab();
    let results = |n_ranks: usize, tokens: &[usize]| {
        on_ranks(&lab, n_ranks, |rank, trainer| {
            let Trainer { model, samples, ranks, .. } = &mut **trainer;
            evaluate(model, samples, tokens[rank], &mut **ranks, &AtomicUsize::new(0)).unwrap()
        })
    };
    let judge = results(1, &[320]).remove(0);
    for found in results(3, &[320, 160, 2000]) {
        assert_eq!((found.samples, found.label_tokens), (judge.samples, judge.label_tokens));
        assert!((found.eval_loss / judge.eval_loss - 1.0).abs() < FP32, "{} {}", found.eval_loss, judge.eval_loss);
    }
}

#[test]
fn more_ranks_than_samples() {
    let lab = lab().with(&["train.max_steps=4", "data.validation_fraction=0", "train.eval_every=0"]);
    let solo = train(&lab, "solo", 1, &[]);
    same_to_rounding("8 ranks", &train(&lab, "eight", 8, &[]), &solo, FP32);
    same_to_rounding("8 sharded ranks", &train(&lab, "sharded", 8, &["train.shard=true"]), &solo, FP32);
}

#[test]
fn half_precision_with_overflows_is_skipped_by_all_alike() {
    let lab = Lab::overflowing().with(&["train.checkpoint_every=3", "train.max_steps=9", "lora.dropout=0.1"]);
    let skipped = |dir: &Path| -> Vec<(Value, Value)> {
        metrics(dir).iter().map(|line| (line["skipped"].clone(), line["loss_scale"].clone())).collect()
    };
    let solo = train(&lab, "solo", 1, &[]);
    assert!(skipped(&solo).iter().any(|(skipped, _)| *skipped == true));
    for shard in ["false", "true"] {
        let two = train(&lab, &format!("shard = {shard}"), 2, &[&format!("train.shard={shard}")]);
        assert_eq!(skipped(&two), skipped(&solo), "shard = {shard}");
    }
}

/// A job on two ranks that takes some seconds.
fn long(lab: &Lab, arguments: &[&str], more: &[&str]) -> (PathBuf, Child) {
    let dir = lab.path("run");
    let sets = ["train.max_steps=400", "train.checkpoint_every=40", "train.eval_every=0"];
    let arguments = [&["--nproc", "2"], arguments].concat();
    let child = lab.command("train", &arguments, &[&sets, more].concat()).stderr(Stdio::piped()).spawn().unwrap();
    (dir, child)
}

/// The processes of a job's ranks, in their order.
pub(crate) fn ranks_of(supervisor: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().map(Result::unwrap) {
        let Ok(process) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let has = |text: String| environment.split(|&byte| byte == 0).any(|variable| variable == text.as_bytes());
        if has(format!("BELLORA_SUPERVISOR={supervisor}")) {
            let rank = (0..8).find(|rank| has(format!("BELLORA_RANK={rank}"))).unwrap();
            found.push((rank, process));
        }
    }
    found.sort_unstable();
    found.into_iter().map(|(_, process)| process).collect()
}

pub(crate) fn kill(process: u32, signal: &str) {
    let sent = Command::new("kill").args([&format!("-{signal}"), &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Waits until no process is left of a job.
#[track_caller]
pub(crate) fn nothing_is_left(supervisor: u32) {
    let started = Instant::now();
    while !ranks_of(supervisor).is_empty() {
        assert!(started.elapsed() < Duration::from_secs(60), "ranks are left: {:?}", ranks_of(supervisor));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
pub(crate) fn says(ran: &Ran, words: &[&str]) {
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in: {}", ran.stderr);
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_job_and_is_named() {
    let lab = lab();
    for victim in [0, 1] {
        let (dir, mut child) = long(&lab, &[], &[]);
        wait_until(&mut child, || n_lines(&dir) >= 50);
        let supervisor = child.id();
        kill(ranks_of(supervisor)[victim], "KILL");
        let ran = ended(child);
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        says(&ran, &[&format!("error: rank {victim}: was killed (SIGKILL)"), "at step", "[rank 0] step"]);
        nothing_is_left(supervisor);
        let newest = *checkpoint_steps(&dir).last().unwrap();
        bellora::checkpoint::manifest::verify(&step_dir(&dir, newest)).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn a_job_is_restarted_and_comes_out_the_same() {
    let lab = lab();
    let sets = ["train.shard=true", "train.max_steps=160", "train.checkpoint_every=20"];
    let (dir, child) = long(&lab, &[], &sets);
    ended(child).ok();
    let straight = lab.path("straight");
    std::fs::rename(&dir, &straight).unwrap();
    let (dir, mut child) = long(&lab, &["--max-restarts", "1"], &sets);
    wait_until(&mut child, || n_lines(&dir) >= 50);
    kill(ranks_of(child.id())[1], "KILL");
    let ran = ended(child).ok();
    says(&ran, &["starting all ranks again, 1 of at most 1 times", "goes on from step"]);
    assert_eq!(logged_steps(&dir), (1..=160).collect::<Vec<_>>());
    assert_same_run("restarted", &dir, &straight);
}

#[test]
fn ranks_end_with_their_supervisor() {
    let lab = lab();
    let (dir, mut child) = long(&lab, &[], &[]);
    wait_until(&mut child, || n_lines(&dir) >= 10);
    let supervisor = child.id();
    assert_eq!(ranks_of(supervisor).len(), 2);
    child.kill().unwrap();
    ended(child);
    nothing_is_left(supervisor);
    assert!(n_lines(&dir) < 400, "they did not end because they were done");
}

#[test]
fn a_signal_to_the_supervisor_stops_all_ranks_after_the_same_step() {
    // Sharded, all take part in a checkpoint, and have to know whether the step at which they stop has one already.
    for sets in [&[][..], &["train.shard=true"], &["train.shard=true", "train.checkpoint_every=1"]] {
        let lab = lab();
        let (dir, mut child) = long(&lab, &[], sets);
        wait_until(&mut child, || n_lines(&dir) >= 10);
        let supervisor = child.id();
        signal(&child, "INT");
        let ran = ended(child);
        assert_eq!(ran.code, Some(130), "{sets:?}: {}", ran.stderr);
        says(&ran, &["stopped by Ctrl-C", "bellora resume"]);
        nothing_is_left(supervisor);
        assert_eq!(checkpoint_steps(&dir).last(), Some(&(n_lines(&dir) as u64)), "{sets:?}: the last step is saved");
    }
}

#[test]
fn a_rank_that_stands_still_is_found() {
    let lab = lab();
    let (dir, mut child) = long(&lab, &["--hang-timeout", "3"], &[]);
    wait_until(&mut child, || n_lines(&dir) >= 10);
    let supervisor = child.id();
    kill(ranks_of(supervisor)[1], "STOP");
    let ran = ended(child);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    says(&ran, &["no rank has got on for 3 s", "rank 0: step", "rank 1: step"]);
    nothing_is_left(supervisor);
}

#[test]
fn a_config_at_fault_is_refused_before_any_rank_starts() {
    let lab = lab();
    let ran = lab.run("train", &["--nproc", "2"], &["train.learning_rate=-1"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(!ran.stderr.contains("rank"), "{}", ran.stderr);
    for (arguments, words) in [
        (&["--nproc", "0"][..], &["--nproc", "number of processes"][..]),
        (&["--nnodes", "2"], &["--rendezvous", "hint:"]),
        (&["--nnodes", "2", "--node-rank", "2", "--rendezvous", "127.0.0.1:1"], &["--node-rank", "less than"]),
    ] {
        let ran = lab.run("train", arguments, &[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        says(&ran, words);
    }
    assert!(!lab.path("run").exists());
}

/// Places that another program gives, as torchrun does; here on one machine, without a supervisor.
#[test]
fn ranks_find_their_places_in_the_environment() {
    let lab = lab().with(&["train.max_steps=4"]);
    let solo = train(&lab, "solo", 1, &[]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut process = lab.command("train", &[], &[]);
        process.env("RANK", rank.to_string()).env("WORLD_SIZE", "2").env("BELLORA_TOKEN", "a secret of this test");
        process.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        process.stderr(Stdio::piped()).spawn().unwrap()
    };
    let ranks = [start(0), start(1)].map(|rank| ended(rank).ok());
    assert!(ranks[0].stderr.lines().all(|line| line.starts_with("[rank 0] ")), "{}", ranks[0].stderr);
    assert_eq!(ranks[1].stderr, "");
    same_to_rounding("by the environment", &lab.path("run"), &solo, FP32);
}

/// Two supervisors on one host stand for two machines.
#[test]
fn two_machines_share_a_job() {
    let lab = lab().with(&["train.max_steps=4"]);
    let solo = train(&lab, "solo", 1, &[]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: usize| {
        let (node, meet) = (node.to_string(), format!("127.0.0.1:{port}"));
        let arguments = ["--nproc", "2", "--nnodes", "2", "--node-rank", &node, "--rendezvous", &meet];
        let mut process = lab.command("train", &arguments, &[]);
        process.env("BELLORA_TOKEN", "a secret of this test").stderr(Stdio::piped()).spawn().unwrap()
    };
    let machines = [start(0), start(1)];
    for machine in machines {
        ended(machine).ok();
    }
    same_to_rounding("two machines", &lab.path("run"), &solo, FP32);
}
