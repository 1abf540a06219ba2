//! What a run that goes on may find changed, what is asked of it on the way, and who may go on with it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use bellora::comm::Solo;
use bellora::disk::{Disk, DiskFile, LocalDisk};
use bellora::run::begin::train;
use bellora::run::requests::Requests;
use bellora::run::start::Host;
use serde_json::Value;

use crate::resume::{
    assert_same_run, checkpoint_steps, copy_folder, ended, files, logged_steps, n_lines, resume, signal, step_dir,
    wait_until,
};
use crate::support::{Lab, Ran, Shape, bellora, metrics, rows, run};

fn resume_with(run_dir: &Path, sets: &[&str]) -> Ran {
    let mut process = bellora();
    process.arg("resume").arg(run_dir);
    for set in sets {
        process.args(["--set", set]);
    }
    run(&mut process)
}

#[track_caller]
fn says(ran: &Ran, words: &[&str]) {
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in: {}", ran.stderr);
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

fn state(run_dir: &Path, step: u64) -> Value {
    serde_json::from_slice(&std::fs::read(step_dir(run_dir, step).join("state.json")).unwrap()).unwrap()
}

/// The signals that a process catches or ignores, as the system tells; signal 1 is the lowest bit.
fn bits_of_signals(process: &str, which: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix(which)).unwrap_or("0");
    u64::from_str_radix(bits.trim(), 16).unwrap()
}

/// A handler on a thread that computes damages the heap: oneDNN's products for fp32 use the stack pointer for something else.
#[test]
fn only_one_thread_takes_signals_and_it_does_not_compute() {
    let lab = long_lab();
    let dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).env("OMP_NUM_THREADS", "2").stderr(Stdio::null()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&dir) >= 5);
    let handled = [1, 2, 15, 10].iter().fold(0, |bits, signal| bits | 1u64 << (signal - 1));
    let mut taking = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().map(Result::unwrap) {
        let thread = format!("{}/task/{}", child.id(), thread.file_name().to_string_lossy());
        let name = std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default();
        if bits_of_signals(&thread, "SigBlk:") & handled != handled && !name.is_empty() {
            taking.push(name.trim().to_owned());
        }
    }
    child.kill().unwrap();
    ended(child);
    assert_eq!(taking, ["signals"]);
}

/// A run that takes some seconds.
fn long_lab() -> Lab {
    let sets = ["train.max_steps=150", "train.global_batch=8", "train.checkpoint_every=40", "lora.dropout=0.1"];
    Lab::new(Shape::default()).with(&sets)
}

#[test]
fn a_run_in_use_is_locked_and_a_killed_one_is_not() {
    let lab = long_lab().with(&["train.checkpoint_every=0"]);
    let dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(Stdio::null()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&dir) >= 5);
    let id = format!("process {} on ", child.id());
    for ran in [resume(&dir), lab.run("train", &["--resume"], &[])] {
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        says(&ran, &[&id, "is at work on this run", "hint:"]);
    }
    child.kill().unwrap();
    ended(child);
    let ran = resume_with(&dir, &["train.max_steps=10"]).ok();
    says(&ran, &[&id, "ended without a word"]);
    assert_eq!(logged_steps(&dir), (1..=10).collect::<Vec<_>>());
    // A process that ends in good order takes its name out.
    assert_eq!(std::fs::read(dir.join("run.lock")).unwrap(), b"");
}

#[test]
fn a_checkpoint_can_be_asked_for_on_the_way() {
    let lab = long_lab().with(&["train.checkpoint_every=0"]);
    lab.run("train", &[], &[]).ok();
    let asked = lab.path("asked");
    let output = format!("train.output={}", asked.display());
    let mut child = lab.command("train", &[], &[&output]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&asked) >= 5);
    signal(&child, "USR1");
    wait_until(&mut child, || asked.join("checkpoints").is_dir() && !checkpoint_steps(&asked).is_empty());
    let ran = ended(child).ok();
    says(&ran, &["is saved, as asked by SIGUSR1"]);
    let saved = checkpoint_steps(&asked);
    assert!(saved.len() == 1 && (5..150).contains(&saved[0]), "{saved:?}");
    bellora::checkpoint::manifest::verify(&step_dir(&asked, saved[0])).unwrap();
    let weights = "adapter/adapter_model.safetensors";
    assert!(same_file(&asked.join(weights), &lab.path("run").join(weights)));
}

#[test]
fn the_end_of_the_terminal_stops_a_run_in_good_order_unless_that_is_ignored() {
    let lab = long_lab();
    let dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&dir) >= 5);
    // Tests that were started by `nohup` hand that down, and then there is only the second half to see.
    let ignored = bits_of_signals("self", "SigIgn:") & 1 == 1;
    if ignored {
        println!("SIGHUP is ignored by these tests: a run that stops by it was not tried");
        signal(&child, "INT");
    } else {
        signal(&child, "HUP");
    }
    let ran = ended(child);
    assert_eq!(ran.code, Some(if ignored { 130 } else { 129 }), "{}", ran.stderr);
    assert_eq!(checkpoint_steps(&dir).last(), Some(&(n_lines(&dir) as u64)), "the last step is saved");

    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_bellora"), "resume"]).arg(&dir);
    shell.args(["--set", "train.max_steps=60"]).env("OMP_NUM_THREADS", "1");
    let started = n_lines(&dir);
    let mut child = shell.stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&dir) >= started + 3);
    signal(&child, "HUP");
    ended(child).ok();
    assert_eq!(n_lines(&dir), 60);
}

/// The second Ctrl-C may come while the checkpoint of the first is being written.
/// At a time limit SLURM sends SIGTERM, SIGCONT and SIGTERM within milliseconds; srun sends a Ctrl-C twice.
#[test]
fn signals_that_come_together_are_one_request_to_stop_in_good_order() {
    let lab = long_lab();
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("stopped");
    let output = format!("train.output={}", dir.display());
    let mut child = lab.command("train", &[], &[&output]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || step_dir(&dir, 40).exists() && n_lines(&dir) >= 45);
    ["TERM", "CONT", "TERM"].iter().for_each(|name| signal(&child, name));
    let ran = ended(child);
    assert_eq!(ran.code, Some(143), "{}", ran.stderr);
    assert_eq!(checkpoint_steps(&dir).last(), Some(&(n_lines(&dir) as u64)), "the last step is saved: {}", ran.stderr);
    resume(&dir).ok();
    assert_same_run("stopped by two signals", &dir, &lab.path("run"));
}

#[test]
fn a_later_interrupt_stops_at_once() {
    // A step takes minutes on the fastest of machines: over 20 TFLOP.
    let shape =
        Shape { hidden: 256, intermediate: 1024, layers: 8, heads: 8, kv_heads: 8, head_dim: 32, ..Shape::default() };
    let lab = Lab::new(shape);
    lab.write_rows("rows.jsonl", &rows(6000, 4));
    let lab = lab.with(&["train.global_batch=6000", "train.max_steps=1"]);
    let dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(Stdio::piped()).spawn().unwrap();
    // It is said how far a long step is: from then on it has surely begun.
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("step 1: ") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "it has ended: {said}");
    }
    signal(&child, "INT");
    std::thread::sleep(std::time::Duration::from_millis(3500));
    assert!(child.try_wait().unwrap().is_none(), "the first one waits for the step");
    signal(&child, "INT");
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(ended(child).code, Some(130), "{said}");
    assert_eq!(n_lines(&dir), 0, "the step was not waited for");
}

#[test]
fn an_evaluation_that_a_signal_cuts_short_comes_after_the_resume() {
    let lab = Lab::new(Shape::default());
    let validation = lab.write_rows("validation.jsonl", &rows(3000, 4));
    let validation = format!("data.validation={}", validation.display());
    let sets = ["train.max_steps=2", "train.eval_every=1", "train.checkpoint_every=2", "lora.dropout=0.1", &validation];
    let lab = lab.with(&sets);
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("stopped");
    let output = format!("train.output={}", dir.display());
    for step in 1..=2 {
        let mut child = match step {
            1 => lab.command("train", &[], &[&output]),
            _ => {
                let mut process = bellora();
                process.arg("resume").arg(&dir);
                process
            }
        };
        // The line of a step, and before it that of the earlier step's evaluation.
        let mut child = child.stderr(Stdio::piped()).spawn().unwrap();
        wait_until(&mut child, || n_lines(&dir) >= 2 * step - 1);
        signal(&child, "INT");
        let ran = ended(child);
        assert_eq!(ran.code, Some(130), "{}", ran.stderr);
        assert_eq!(n_lines(&dir), 2 * step - 1, "no evaluation was waited for");
        assert_eq!(state(&dir, step as u64)["evaluation_is_due"], true);
    }
    resume(&dir).ok();
    // The checkpoint of step 1 is the signal's own.
    assert_same_run("stopped in both evaluations", &dir, &lab.path("run"));
}

#[test]
fn a_signal_before_the_first_step_ends_the_program_at_once() {
    let lab = Lab::new(Shape::default());
    lab.write_rows("rows.jsonl", &rows(60_000, 3));
    let dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(Stdio::piped()).spawn().unwrap();
    let process = child.id().to_string();
    wait_until(&mut child, || bits_of_signals(&process, "SigCgt:") >> 9 & 1 == 1);
    signal(&child, "INT");
    let ran = ended(child);
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert!(!dir.exists(), "{:?}", files(&dir).keys());
}

/// From the step that it goes on from, a longer run is the one that was that long from the start.
#[test]
fn a_finished_run_can_be_made_longer() {
    let sets = ["train.schedule=constant", "train.warmup_steps=0", "lora.dropout=0.1", "train.checkpoint_every=2"];
    let lab = Lab::new(Shape::default()).with(&sets);
    lab.run("train", &[], &["train.max_steps=6"]).ok();
    let dir = lab.path("longer");
    let output = format!("train.output={}", dir.display());
    lab.run("train", &[], &["train.max_steps=4", &output]).ok();
    let first = std::fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap();

    let ran = resume_with(&dir, &["train.max_steps=6"]).ok();
    says(
        &ran,
        &["goes on from step 4 of 6", "train.max_steps is 6 here and was 4", "6 steps instead of 4", "from step 5 on"],
    );
    assert_same_run("made longer", &dir, &lab.path("run"));
    let aside = dir.join("adapter-step-00000004/adapter_model.safetensors");
    assert_eq!(std::fs::read(aside).unwrap(), first, "the first adapter stays");
    assert!(resume(&dir).ok().stderr.contains("finished"));

    // Not shorter than it is, and not by accident.
    let before = files(&dir);
    let ran = resume_with(&dir, &["train.max_steps=5"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    says(&ran, &["train.max_steps", "5 steps", "6 are done already", "hint:"]);
    assert!(files(&dir) == before, "a file has changed");
}

#[test]
fn the_schedule_of_a_longer_run_is_that_of_its_new_length() {
    let lab = Lab::new(Shape::default()).with(&["train.schedule=linear", "train.checkpoint_every=2"]);
    lab.run("train", &[], &["train.max_steps=4"]).ok();
    resume_with(&lab.path("run"), &["train.max_steps=8"]).ok();
    lab.run("train", &[], &["train.max_steps=8", &format!("train.output={}", lab.path("straight").display())]).ok();
    let rates =
        |dir: &str| -> Vec<f64> { metrics(&lab.path(dir)).iter().map(|line| line["lr"].as_f64().unwrap()).collect() };
    assert_eq!(rates("run")[4..], rates("straight")[4..]);
    assert_ne!(rates("run")[..4], rates("straight")[..4]);
}

#[test]
fn base_and_data_may_move() {
    let lab = Lab::new(Shape::default()).with(&["lora.dropout=0.1", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let straight = lab.path("run");
    let dir = lab.path("moved");
    copy_folder(&straight, &dir);
    std::fs::remove_dir_all(dir.join("adapter")).unwrap();
    std::fs::remove_dir_all(step_dir(&dir, 6)).unwrap();
    std::fs::rename(lab.path("base"), lab.path("elsewhere")).unwrap();
    std::fs::rename(lab.path("rows.jsonl"), lab.path("others.jsonl")).unwrap();
    let ran = resume(&dir);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    says(&ran, &["model.base", "data.train", "hint:"]);

    let base = format!("model.base={}", lab.path("elsewhere").display());
    let tokenizer = format!("model.tokenizer={}", lab.path("elsewhere").display());
    let data = format!("data.train={}", lab.path("others.jsonl").display());
    let ran = resume_with(&dir, &[&base, &tokenizer, &data]).ok();
    says(&ran, &["model.base is", "elsewhere", "and was", "data.train is"]);
    for file in ["adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"] {
        assert!(same_file(&dir.join(file), &straight.join(file)), "{file}");
    }
    // Of the same shapes, but another one.
    std::fs::remove_dir_all(dir.join("adapter")).unwrap();
    let weights = lab.path("elsewhere/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let ran = resume(&dir);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    says(&ran, &["model.base", "not what the run", "started with"]);
}

#[test]
fn a_config_of_a_run_that_was_edited_by_hand_is_refused() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("run");
    std::fs::remove_dir_all(dir.join("adapter")).unwrap();
    let path = dir.join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("learning_rate = 0.002", "learning_rate = 0.003")).unwrap();
    let before = files(&dir);
    let ran = resume(&dir);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    says(&ran, &["train.learning_rate", "is 0.003 here", "started with 0.002", "hint:"]);
    assert!(files(&dir) == before, "a file has changed");
}

#[test]
fn what_rounds_otherwise_is_said() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("run");
    let unfinish = || {
        std::fs::remove_dir_all(dir.join("adapter")).unwrap();
        std::fs::remove_dir_all(step_dir(&dir, 4)).unwrap();
    };
    unfinish();
    let ran = resume_with(&dir, &["train.micro_batch_tokens=200", "train.log_every=2"]).ok();
    says(&ran, &["micro_batch_tokens is 200 here and was 4096", "log_every is 2 here", "not bit for bit"]);
    unfinish();
    let ran = run(bellora().env("OMP_NUM_THREADS", "2").arg("resume").arg(&dir)).ok();
    says(&ran, &["cpu with 2 threads", "before on cpu with 1", "not bit for bit"]);
    unfinish();
    let ran = resume_with(&dir, &["train.log_every=2", "train.micro_batch_tokens=4096"]).ok();
    assert!(!ran.stderr.contains("bit for bit"), "{}", ran.stderr);
}

#[test]
fn the_best_and_the_pinned_checkpoints_stay() {
    let sets = ["train.max_steps=4", "train.checkpoint_every=2", "train.eval_every=1", "train.keep_checkpoints=1"];
    let keep = ["train.keep_best=1", "train.keep_steps=[3]", "train.schedule=constant", "data.validation_fraction=0.2"];
    // A rate at which updates make the model worse from the first one that is not nothing.
    let lab =
        Lab::new(Shape::default()).with(&sets).with(&keep).with(&["train.learning_rate=1", "train.warmup_steps=4"]);
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("run");
    let eval_losses = metrics(&dir).into_iter().filter(|line| line.get("eval_loss").is_some());
    let best = eval_losses
        .filter(|line| [2, 3, 4].contains(&line["step"].as_u64().unwrap()))
        .min_by(|a, b| a["eval_loss"].as_f64().unwrap().total_cmp(&b["eval_loss"].as_f64().unwrap()))
        .unwrap();
    assert_eq!(best["step"], 2, "neither the newest nor the pinned one");
    assert_eq!(checkpoint_steps(&dir), [2, 3, 4]);
    assert_eq!(state(&dir, 4)["evaluated"]["step"], 4);
}

#[test]
fn parameters_that_are_not_finite_are_never_saved() {
    let sets = ["train.learning_rate=1e39", "train.warmup_steps=0", "train.checkpoint_every=1", "train.max_steps=3"];
    let lab = Lab::new(Shape::default()).with(&sets);
    let ran = lab.run("train", &[], &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    says(&ran, &["holds NaN or infinity and is not saved", "lora_", "learning_rate"]);
    assert_eq!(checkpoint_steps(&lab.path("run")), [0; 0]);
    assert!(!lab.path("run/adapter").exists());
}

/// The local disk with so much room.
#[derive(Debug)]
struct Small(u64);

impl Disk for Small {
    fn create_folder(&self, path: &Path) -> std::io::Result<()> {
        LocalDisk.create_folder(path)
    }
    fn create(&self, path: &Path) -> std::io::Result<Box<dyn DiskFile>> {
        LocalDisk.create(path)
    }
    fn append(&self, path: &Path) -> std::io::Result<Box<dyn DiskFile>> {
        LocalDisk.append(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        LocalDisk.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> std::io::Result<()> {
        LocalDisk.remove_file(path)
    }
    fn remove_folder(&self, path: &Path) -> std::io::Result<()> {
        LocalDisk.remove_folder(path)
    }
    fn sync_folder(&self, path: &Path) -> std::io::Result<()> {
        LocalDisk.sync_folder(path)
    }
    fn free_bytes(&self, _: &Path) -> std::io::Result<u64> {
        Ok(self.0)
    }
}

#[test]
fn a_run_that_cannot_fit_on_its_disk_is_refused() {
    let lab = Lab::new(Shape::default()).with(&["train.keep_checkpoints=2", "train.checkpoint_every=1"]);
    let params = bellora::run::setup::Job::inspect(lab.config(&[]), bellora::run::setup::CacheUse::Off, 1)
        .unwrap()
        .model
        .layout
        .n_params() as u64;
    // Two that stay, one that is being written, the adapter, and 16 MiB for what is small.
    let needed = (3 * 12 + 4) * params + (16 << 20);
    let host =
        |bytes| Host { disk: Arc::new(Small(bytes)), requests: Requests::default(), tell: None, n_local_ranks: 1 };
    let error = train(lab.config(&[]), false, &host(needed - 1), Box::new(Solo)).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let [fault] = error.faults() else { panic!("{error}") };
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let numbers = [&*mib(needed - 1), &*mib(needed), &*format!("3 checkpoints of {}", mib(12 * params))];
    assert!(fault.place == "train.output" && !fault.hint.is_empty(), "{fault:?}");
    numbers.iter().for_each(|number| assert!(fault.what.contains(number), "{number} is not in {}", fault.what));
    assert!(!lab.path("run").exists());
    train(lab.config(&[]), false, &host(needed), Box::new(Solo)).unwrap();
    assert!(lab.path("run/adapter").is_dir());
}
