//! Runs whose disk fails, fills up or loses power at any operation, and checkpoints that were damaged afterwards. Whatever
//! happens: the run goes on, or it ends with an error that says what happened; checkpoints are whole; and the run that goes on
//! from there is the run that was left in peace, bit for bit.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;

use bellora::checkpoint::manifest::{newest_good, step_dir, verify};
use bellora::comm::Solo;
use bellora::disk::{LocalDisk, names, remove_tree};
use bellora::error::{Error, Result};
use bellora::run::begin;
use bellora::run::requests::Requests;
use bellora::run::start::Host;
use bellora::run::training_loop::RunOutcome;

use crate::faulty_disk::{Fault, FaultyDisk, Point};
use crate::resume::{assert_same_folder, assert_same_metrics, copy_folder};
use crate::support::{Draws, Lab, Shape};

const LAST_STEP: u64 = 8;

/// The checkpoint whose every operation fails once: old ones are deleted after it, and another comes later.
const TRIED_STEP: u64 = 6;

/// A small run on a folder that can be emptied, and what it gives when nothing disturbs it.
struct Bench {
    lab: Lab,
    /// What the disk holds.
    root: PathBuf,
    /// A copy of the undisturbed run's folder.
    straight: PathBuf,
    /// What that run did on the disk.
    done: Vec<Point>,
}

impl Bench {
    fn new() -> Self {
        // So small that hundreds of runs take seconds.
        let shape = Shape { hidden: 16, intermediate: 16, layers: 1, heads: 2, kv_heads: 1, ..Shape::default() };
        let lab = Lab::new(shape);
        let root = lab.path("disk");
        std::fs::create_dir(&root).unwrap();
        let output = format!("train.output={}", root.join("runs/one").display());
        let max_steps = format!("train.max_steps={LAST_STEP}");
        let lab = lab.with(&[
            &output,
            &max_steps,
            "train.global_batch=2",
            "train.checkpoint_every=2",
            "train.keep_checkpoints=2",
            "train.eval_every=4",
            "train.log_every=3",
            "data.validation_fraction=0.2",
            "data.shuffle=true",
            "lora.dropout=0.1",
        ]);
        let mut bench = Self { straight: lab.path("straight"), lab, root, done: Vec::new() };
        let disk = FaultyDisk::new(&bench.root);
        assert_eq!(bench.train(&disk, false).unwrap(), RunOutcome::Trained);
        // A lock must be the system's own; all else goes through the disk.
        assert_eq!(disk.written_past(), ["/runs/one/run.lock"]);
        bench.done = disk.done();
        std::fs::create_dir(&bench.straight).unwrap();
        copy_folder(&bench.run_dir(), &bench.straight);
        bench
    }

    fn run_dir(&self) -> PathBuf {
        self.root.join("runs/one")
    }

    fn train(&self, disk: &FaultyDisk, resume: bool) -> Result<RunOutcome> {
        let host = Host { disk: disk.shared(), requests: Requests::default(), tell: None, n_local_ranks: 1 };
        begin::train(self.lab.config(&[]), resume, &host, Box::new(Solo))
    }

    fn empty(&self) {
        for name in names(&self.root).unwrap() {
            remove_tree(&LocalDisk, &self.root.join(name)).unwrap();
        }
    }

    /// Trains with a fault at a point, and goes on afterwards. `known` is the step of the newest checkpoint that is there
    /// before: 0 for a new run.
    fn try_fault(&self, at: &Point, fault: Fault, known: u64, seed: u64) {
        let what = format!("{fault:?} at {at}, seed {seed}");
        let disk = FaultyDisk::failing(&self.root, at, fault);
        let outcome = self.train(&disk, known > 0);
        assert!(disk.has_failed(), "{what}: the run never came to it");
        self.judge_outcome(&what, at, fault, &outcome, known > 0);
        if fault == Fault::PowerCut {
            disk.after_power_cut(seed);
        }

        let checkpoints = self.run_dir().join("checkpoints");
        for name in names(&checkpoints).unwrap().iter().filter(|name| !name.starts_with('.')) {
            let whole = verify(&checkpoints.join(name));
            assert!(whole.is_ok(), "{what}: {name}: {whole:?}");
        }
        let newest = newest_good(&checkpoints).unwrap().good.map_or(0, |(step, _)| step);
        let certain = known.max(certain_step(&disk.done(), at));
        assert!(newest >= certain, "{what}: the checkpoint of step {certain} is lost; the newest is of step {newest}");
        if self.run_dir().join("adapter").exists() {
            verify(&self.run_dir().join("adapter")).unwrap();
        }

        let again = FaultyDisk::new(&self.root);
        let went_on = self.train(&again, true);
        assert!(went_on.is_ok(), "{what}: the run does not go on: {went_on:?}");
        let log = self.train_log();
        assert!(!log.contains("damaged") && !log.contains("metrics.jsonl has"), "{what}: {log}");
        assert_same_folder(&what, &self.run_dir().join("adapter"), &self.straight.join("adapter"));
        assert_same_metrics(&what, &self.run_dir(), &self.straight);
        let [last, judge] =
            [self.run_dir(), self.straight.clone()].map(|d| step_dir(&d.join("checkpoints"), LAST_STEP));
        // The last checkpoint may be what the fault has cost a run that went on to its end.
        if last.exists() || outcome.is_err() {
            assert_same_folder(&what, &last, &judge);
        }
    }

    fn judge_outcome(&self, what: &str, at: &Point, fault: Fault, outcome: &Result<RunOutcome>, is_start: bool) {
        let is_log = ["runs/one/train.log", "runs/one/metrics.jsonl", "runs/one/tensorboard/events"]
            .iter()
            .any(|l| at.path.starts_with(l));
        let is_write_of_log = is_log && at.operation == "write";
        let is_full = matches!(fault, Fault::Full { .. });
        match outcome {
            Err(error) => {
                let Error::Io { path, source, .. } = error else { panic!("{what}: {error}") };
                assert!(path.starts_with(&self.root), "{what}: {error}");
                assert_eq!(source.raw_os_error(), Some(if is_full { 28 } else { 5 }), "{what}: {error}");
                // A save that fails costs the save, and a full disk no line of the logs.
                let in_a_save = at.path.starts_with("runs/one/checkpoints") && !is_start;
                let costs_no_run = in_a_save || is_full && is_write_of_log;
                // But for the adapter, which comes last: a run without it has not ended well.
                let may_end = !costs_no_run || path.starts_with(self.incomplete_adapter());
                assert!(may_end || fault == Fault::PowerCut, "{what}: the run ended: {error}");
            }
            Ok(_) => {
                assert_ne!(fault, Fault::PowerCut, "{what}: the run went on without power");
                let log = self.train_log();
                let is_told = match fault {
                    // A line that waited only until the next one was written is not worth a word.
                    Fault::Full { n_refused, .. } if is_write_of_log => n_refused > 1 && !self.is_last_like_it(at),
                    _ => at.operation != "ask for room",
                };
                // Whom a full disk refuses next is a matter of which thread comes first.
                let says = |words: &str| log.contains(words);
                let is_said =
                    if is_full { says("os error 28") || says("no room on the disk") } else { says("os error 5") };
                assert!(!is_told || is_said, "{what}: it is not told: {log}");
            }
        }
    }

    /// Whether an operation is the last of its kind on its file.
    fn is_last_like_it(&self, at: &Point) -> bool {
        let is_later = |p: &Point| p.operation == at.operation && p.path == at.path && p.nth > at.nth;
        !self.done.iter().any(is_later)
    }

    fn incomplete_adapter(&self) -> PathBuf {
        self.run_dir().join(".incomplete-adapter")
    }

    fn train_log(&self) -> String {
        let log = std::fs::read_to_string(self.run_dir().join("train.log")).unwrap_or_default();
        // The rest is the same in every run.
        let is_of_this_run =
            |line: &&str| ["warning", "goes on", "there is", "checkpoint"].iter().any(|w| line.starts_with(w));
        log.lines().filter(is_of_this_run).map(|line| format!("{line}\n")).collect()
    }
}

/// The step whose checkpoint was on the disk for certain before a point: renamed, and its folder synced.
fn certain_step(done: &[Point], until: &Point) -> u64 {
    let (mut renamed, mut certain) = (0, 0);
    for point in done.iter().take_while(|point| *point != until) {
        if point.operation == "rename to"
            && let Some(step) = point.path.strip_prefix("runs/one/checkpoints/step-")
        {
            renamed = renamed.max(step.parse().unwrap());
        }
        if point.operation == "sync folder" && point.path == "runs/one/checkpoints" {
            certain = renamed;
        }
    }
    certain
}

/// Every kind of fault for an operation.
fn faults(point: &Point) -> Vec<(Fault, u64)> {
    let full = |torn, n_refused| (Fault::Full { torn, n_refused }, 0);
    let mut faults = vec![(Fault::Broken, 0), full(false, 1), full(false, 25)];
    if point.operation == "write" {
        faults.push(full(true, 1));
    }
    faults.extend((0..3).map(|seed| (Fault::PowerCut, seed)));
    faults
}

fn try_all(bench: &Bench, points: &[&Point], known: u64, before: impl Fn()) {
    let (mut n_tries, mut failed) = (0, Vec::new());
    for (i, point) in points.iter().enumerate() {
        for (fault, kind) in faults(point) {
            bench.empty();
            before();
            let tried = AssertUnwindSafe(|| bench.try_fault(point, fault, known, kind + 3 * i as u64));
            if let Err(panic) = std::panic::catch_unwind(tried) {
                failed.push(panic.downcast_ref::<String>().cloned().unwrap_or_default());
            }
            n_tries += 1;
        }
    }
    assert!(failed.is_empty(), "{} of {n_tries} faults:\n{}", failed.len(), failed.join("\n"));
    println!("{n_tries} faults at {} operations, of {} in the run", points.len(), bench.done.len());
}

/// Runs one of the tests below in a process of its own: what hundreds of runs tell would fill the console.
#[track_caller]
fn in_a_process_of_its_own(test: &str) {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args([&format!("faults::{test}"), "--exact", "--ignored", "--nocapture"]).env("OMP_NUM_THREADS", "1");
    // Files in memory are as good here, and several times as fast: the disk that the tests speak of is a model.
    if Path::new("/dev/shm").is_dir() {
        process.env("TMPDIR", "/dev/shm");
    }
    let output = process.output().unwrap();
    let [said, console] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let end: Vec<&str> = console.lines().rev().take(60).collect();
    let end: Vec<&str> = end.into_iter().rev().collect();
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}", end.join("\n"));
    said.lines().filter(|line| line.contains("operations")).for_each(|line| println!("{line}"));
}

#[test]
fn a_fault_at_any_operation_of_a_checkpoint_costs_no_run() {
    in_a_process_of_its_own("operations_of_a_checkpoint");
}

#[test]
fn a_fault_anywhere_in_a_run_loses_nothing() {
    in_a_process_of_its_own("some_operations_of_a_run");
}

#[test]
fn a_fault_while_a_run_goes_on_from_a_checkpoint_loses_nothing() {
    in_a_process_of_its_own("operations_of_a_start");
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn operations_of_a_checkpoint() {
    let bench = Bench::new();
    let is_of = |point: &Point, step: u64| point.path.contains(&format!("step-{step:08}"));
    let begin = bench.done.iter().position(|point| is_of(point, TRIED_STEP)).unwrap();
    let end = bench.done.iter().position(|point| is_of(point, TRIED_STEP + 2)).unwrap();
    let of_saver = |point: &&Point| point.path.starts_with("runs/one/checkpoints");
    let points: Vec<&Point> = bench.done[begin..end].iter().filter(of_saver).collect();
    for operation in ["ask for room", "create folder", "create", "write", "sync", "rename to", "sync folder", "delete"]
    {
        assert!(points.iter().any(|point| point.operation == operation), "a save does not {operation}");
    }
    try_all(&bench, &points, 0, || {});
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn some_operations_of_a_run() {
    let bench = Bench::new();
    let mut draws = Draws::new(21);
    // The start and the end matter most, and have few operations.
    let is_rare =
        |point: &Point| !["runs/one/checkpoints", "runs/one/.incomplete"].iter().any(|p| point.path.starts_with(p));
    let points = bench.done.iter().filter(|point| draws.uniform() < if is_rare(point) { 0.3 } else { 0.1 });
    try_all(&bench, &points.collect::<Vec<_>>(), 0, || {});
}

#[test]
#[ignore = "takes minutes: cargo test --release --test all -- faults::every_operation_of_a_run --exact --ignored"]
fn every_operation_of_a_run() {
    let bench = Bench::new();
    try_all(&bench, &bench.done.iter().collect::<Vec<_>>(), 0, || {});
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn operations_of_a_start() {
    let bench = Bench::new();
    // What a power cut in the middle of a save leaves: half a checkpoint, and lines of steps that come again.
    let in_a_save = |point: &&Point| point.operation == "sync" && point.path.contains("incomplete-step-00000006");
    let at = bench.done.iter().find(in_a_save).unwrap();
    bench.empty();
    let disk = FaultyDisk::failing(&bench.root, at, Fault::PowerCut);
    bench.train(&disk, false).unwrap_err();
    let everything = 1;
    disk.after_power_cut(everything);
    let left = bench.lab.path("left");
    std::fs::create_dir(&left).unwrap();
    copy_folder(&bench.root, &left);
    assert!(left.join("runs/one/checkpoints/.incomplete-step-00000006").exists());

    let disk = FaultyDisk::new(&bench.root);
    bench.train(&disk, true).unwrap();
    let done = disk.done();
    let until = done.iter().position(|point| {
        point.path == "runs/one/checkpoints/.incomplete-step-00000006" && point.operation == "create folder"
    });
    let points: Vec<&Point> = done[..until.unwrap()].iter().collect();
    assert!(points.iter().any(|point| point.path == "runs/one/metrics.jsonl" && point.operation == "rename to"));
    try_all(&bench, &points, 4, || copy_folder(&left, &bench.root));
}

/// Damages a file in turn by every way that `ways` gives, and looks whether it shows.
fn damage(bench: &Bench, path: &Path, ways: impl Iterator<Item = Vec<u8>>) -> usize {
    let whole = std::fs::read(path).unwrap();
    let mut n_ways = 0;
    for bytes in ways {
        assert_ne!(bytes, whole);
        std::fs::write(path, &bytes).unwrap();
        let newest = newest_good(&bench.run_dir().join("checkpoints")).unwrap();
        let good = newest.good.map(|(step, _)| step);
        assert_eq!(good, Some(LAST_STEP - 2), "{}: damage number {n_ways} does not show", path.display());
        let (dir, error) = &newest.damaged[0];
        // A byte of the manifest may be one of another file's name.
        let named = if path.ends_with("MANIFEST.json") { dir } else { path };
        assert!(error.to_string().contains(&named.display().to_string()), "{error}");
        n_ways += 1;
    }
    std::fs::write(path, whole).unwrap();
    n_ways
}

#[test]
fn every_truncation_and_a_byte_that_has_changed_show() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    let adapter = bench.run_dir().join("adapter");
    std::fs::remove_dir_all(&adapter).unwrap();
    let dir = step_dir(&bench.run_dir().join("checkpoints"), LAST_STEP);
    let mut draws = Draws::new(4);
    for name in names(&dir).unwrap() {
        let path = dir.join(&name);
        let whole = std::fs::read(&path).unwrap();
        let is_small = whole.len() <= 1500;
        let lengths: Vec<usize> = match is_small {
            true => (0..whole.len()).collect(),
            false => [0, 1, 8, whole.len() - 1].into_iter().chain((0..60).map(|_| draws.below(whole.len()))).collect(),
        };
        let n_cut = damage(&bench, &path, lengths.iter().map(|length| whole[..*length].to_vec()));
        let flipped = |_| {
            let mut bytes = whole.clone();
            let at = draws.below(bytes.len());
            // Half of them in one bit, the others in any.
            bytes[at] ^= if draws.below(2) == 0 { 1 << draws.below(8) } else { 1 + draws.below(255) as u8 };
            bytes
        };
        let n_flips = if name == "MANIFEST.json" { 400 } else { 60 };
        damage(&bench, &path, (0..n_flips).map(flipped));
        println!("{name}: {} bytes, {n_cut} truncations, {n_flips} flips", whole.len());

        // And the run goes on from the one before.
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let disk = FaultyDisk::new(&bench.root);
        assert_eq!(bench.train(&disk, true).unwrap(), RunOutcome::Trained);
        assert!(bench.train_log().contains(&format!("goes on from step {} of {LAST_STEP}", LAST_STEP - 2)));
        assert_same_folder(&name, &adapter, &bench.straight.join("adapter"));
        assert_same_folder(&name, &dir, &step_dir(&bench.straight.join("checkpoints"), LAST_STEP));
        assert_same_metrics(&name, &bench.run_dir(), &bench.straight);
        std::fs::remove_dir_all(&adapter).unwrap();
        std::fs::remove_file(bench.run_dir().join("train.log")).unwrap();
    }
}
