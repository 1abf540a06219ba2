//! Runs that stop and go on: by a signal, by a kill, from a damaged folder. What comes out is bit for bit what a run
//! that was never stopped gives, and `metrics.jsonl` has every step once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Lab, Ran, Shape, bellora, metrics, rows, run};

/// Every file beneath a folder with its contents.
pub(crate) fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.insert(entry.path(), std::fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// Copies every file beneath a folder into another.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for (path, contents) in files(from) {
        let path = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    }
}

pub(crate) fn step_dir(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join(format!("checkpoints/step-{step:08}"))
}

pub(crate) fn checkpoint_steps(run_dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(run_dir.join("checkpoints")).unwrap();
    let step = |name: &str| name.strip_prefix("step-").and_then(|digits| digits.parse().ok());
    let mut steps: Vec<u64> = names.filter_map(|entry| step(entry.unwrap().file_name().to_str().unwrap())).collect();
    steps.sort_unstable();
    steps
}

/// The lines of `metrics.jsonl` without what a clock says.
fn timeless_metrics(run_dir: &Path) -> Vec<Value> {
    let mut lines = metrics(run_dir);
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        let n_keys = line.len();
        for key in ["step_secs", "tokens_per_s", "eval_secs"] {
            line.shift_remove(key);
        }
        assert!(line.len() < n_keys, "{line:?}");
    }
    lines
}

/// The steps of the lines that tell of updates.
pub(crate) fn logged_steps(run_dir: &Path) -> Vec<u64> {
    let lines = metrics(run_dir);
    lines.iter().filter(|line| line.get("loss").is_some()).map(|line| line["step"].as_u64().unwrap()).collect()
}

/// Holds a run that was stopped against one that was not: adapter, last checkpoint with the optimizer's state, metrics.
#[track_caller]
pub(crate) fn assert_same_run(what: &str, ours: &Path, judge: &Path) {
    let last = *checkpoint_steps(judge).last().unwrap();
    for folder in [PathBuf::from("adapter"), step_dir(Path::new(""), last)] {
        assert_same_folder(what, &ours.join(&folder), &judge.join(&folder));
    }
    assert_same_metrics(what, ours, judge);
}

/// Holds the files of a folder against those of another, byte for byte.
#[track_caller]
pub(crate) fn assert_same_folder(what: &str, ours_dir: &Path, judge_dir: &Path) {
    let relative = |dir: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        files(dir).into_iter().map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_path_buf(), bytes)).collect()
    };
    let (ours, judge) = (relative(ours_dir), relative(judge_dir));
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&judge), "{what}: {}", ours_dir.display());
    for (name, bytes) in &ours {
        assert!(*bytes == judge[name], "{what}: {} differs", ours_dir.join(name).display());
    }
}

/// Holds the metrics of a run against those of another, times aside.
#[track_caller]
pub(crate) fn assert_same_metrics(what: &str, ours: &Path, judge: &Path) {
    let (ours, judge) = (timeless_metrics(ours), timeless_metrics(judge));
    for (ours, judge) in ours.iter().zip(&judge) {
        assert_eq!(ours, judge, "{what}: metrics.jsonl");
    }
    assert_eq!(ours.len(), judge.len(), "{what}: lines of metrics.jsonl");
}

pub(crate) fn resume(run_dir: &Path) -> Ran {
    run(bellora().arg("resume").arg(run_dir))
}

/// Trains straight through; then again from a copy that was killed shortly after each of the steps `kept`.
pub(crate) fn straight_equals_resumed(what: &str, lab: &Lab, n_steps: u64, kept: &[u64]) {
    lab.run("train", &[], &["train.keep_checkpoints=100"]).ok();
    let straight = lab.path("run");
    assert_eq!(logged_steps(&straight), (1..=n_steps).collect::<Vec<_>>(), "{what}");
    for &step in kept {
        let copy = lab.path(&format!("from-{step}"));
        copy_folder(&straight, &copy);
        std::fs::remove_dir_all(copy.join("adapter")).unwrap();
        for later in checkpoint_steps(&copy).into_iter().filter(|&s| s > step) {
            std::fs::remove_dir_all(step_dir(&copy, later)).unwrap();
        }
        let ran = resume(&copy).ok();
        assert!(ran.stderr.contains(&format!("goes on from step {step} of {n_steps}")), "{}", ran.stderr);
        assert_same_run(&format!("{what}, from step {step}"), &copy, &straight);
    }
}

#[test]
fn dropout_accumulation_and_evaluation() {
    let sets = [
        "lora.dropout=0.1",
        "train.global_batch=6",
        "train.micro_batch_tokens=200",
        "train.max_steps=8",
        "train.checkpoint_every=3",
        "train.eval_every=2",
        "data.validation_fraction=0.2",
        "data.shuffle=true",
    ];
    let lab = Lab::new(Shape::default()).with(&sets);
    // 8 is saved because the run ends there.
    straight_equals_resumed("dropout and accumulation", &lab, 8, &[3, 6, 8]);
    let evaluated: Vec<u64> = metrics(&lab.path("from-3"))
        .iter()
        .filter(|line| line.get("eval_loss").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [2, 4, 6, 8]);
}

#[test]
fn an_uneven_last_update_at_the_end_of_an_epoch() {
    let sets = ["train.epochs=3", "train.checkpoint_every=2", "data.shuffle=true", "lora.dropout=0.1"];
    let lab = Lab::new(Shape::default()).with(&sets);
    // 18 samples, four an update: the fifth update of an epoch has two.
    straight_equals_resumed("uneven epochs", &lab, 15, &[4, 10]);
    let samples: Vec<_> = metrics(&lab.path("from-4")).iter().map(|line| line["samples"].as_u64().unwrap()).collect();
    assert_eq!(samples, [4, 4, 4, 4, 2, 4, 4, 4, 4, 2, 4, 4, 4, 4, 2]);
}

#[test]
fn trained_tables_and_weight_decay() {
    let tables = "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]";
    let sets = [tables, "train.weight_decay=0.01", "train.checkpoint_every=3", "train.save_dtype=bf16"];
    let lab = Lab::new(Shape { is_tied: true, ..Shape::default() }).with(&sets);
    straight_equals_resumed("trained tables", &lab, 6, &[3]);
}

#[test]
fn bf16() {
    let sets = ["model.dtype=bf16", "lora.dropout=0.05", "train.checkpoint_every=3", "train.micro_batch_tokens=200"];
    straight_equals_resumed("bf16", &Lab::new(Shape::default()).with(&sets), 6, &[3]);
}

#[test]
fn fp16_with_overflows_on_the_way() {
    let lab = Lab::overflowing().with(&["train.checkpoint_every=1", "train.max_steps=9", "lora.dropout=0.1"]);
    straight_equals_resumed("fp16", &lab, 9, &[1, 3, 7]);
    let lines = metrics(&lab.path("run"));
    let skipped: Vec<bool> = lines.iter().map(|line| line["skipped"].as_bool().unwrap()).collect();
    // Stopped among the skipped updates and after them.
    assert!(skipped[1] && skipped[2] && !skipped[8], "{skipped:?}");
}

/// Waits until a running program has come far enough; it must not have ended by then.
#[track_caller]
pub(crate) fn wait_until(child: &mut Child, has_come_far_enough: impl Fn() -> bool) {
    let started = Instant::now();
    while !has_come_far_enough() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "the run ended ({ended:?}) before it was to be stopped");
        assert!(started.elapsed() < Duration::from_secs(120), "the run makes no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn signal(child: &Child, name: &str) {
    let sent = std::process::Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status().unwrap();
    assert!(sent.success());
}

pub(crate) fn ended(child: Child) -> Ran {
    child.wait_with_output().unwrap().into()
}

pub(crate) fn n_lines(run_dir: &Path) -> usize {
    std::fs::read(run_dir.join("metrics.jsonl")).map_or(0, |text| text.iter().filter(|&&b| b == b'\n').count())
}

/// One run is stopped by Ctrl-C, goes on, is stopped by SIGTERM, goes on, is killed after a checkpoint, and ends; another
/// is left in peace.
#[test]
fn signals_and_a_kill_change_nothing() {
    // Long enough for a signal to arrive well before the end.
    let sets = ["train.max_steps=150", "train.global_batch=8", "train.checkpoint_every=40", "lora.dropout=0.1"];
    let lab = Lab::new(Shape::default()).with(&sets).with(&["data.shuffle=true"]);
    lab.run("train", &[], &[]).ok();
    let straight = lab.path("run");
    let stopped = lab.path("stopped");
    let output = format!("train.output={}", stopped.display());

    let mut child = lab.command("train", &[], &[&output]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&stopped) >= 10);
    signal(&child, "INT");
    let ran = ended(child);
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("bellora resume {}", stopped.display())), "{}", ran.stderr);
    let at = n_lines(&stopped) as u64;
    assert_eq!(checkpoint_steps(&stopped).last(), Some(&at), "the last step is saved");
    assert!(!stopped.join("adapter").exists());
    assert!((10..100).contains(&at), "stopped at step {at} of 150");

    let mut child = bellora().arg("resume").arg(&stopped).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || n_lines(&stopped) as u64 >= at + 10);
    signal(&child, "TERM");
    let ran = ended(child);
    assert_eq!(ran.code, Some(143), "{}", ran.stderr);
    assert!(ran.stderr.contains("bellora resume"), "{}", ran.stderr);
    let at = n_lines(&stopped) as u64;
    assert_eq!(checkpoint_steps(&stopped).last(), Some(&at), "the last step is saved");

    let next = at / 40 * 40 + 40;
    let mut child = lab.command("train", &["--resume"], &[&output]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(&mut child, || step_dir(&stopped, next).exists() && n_lines(&stopped) as u64 >= next + 2);
    child.kill().unwrap();
    assert_eq!(ended(child).code, None, "killed");
    assert!(!stopped.join("adapter").exists());

    let ran = resume(&stopped).ok();
    assert!(ran.stderr.contains(&format!("goes on from step {next} of 150")), "{}", ran.stderr);
    assert_eq!(logged_steps(&stopped), (1..=150).collect::<Vec<_>>());
    assert_same_run("stopped three times", &stopped, &straight);
}

#[test]
fn a_damaged_or_half_written_checkpoint_is_passed_over() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=9", "train.checkpoint_every=3", "lora.dropout=0.1"]);
    lab.run("train", &[], &[]).ok();
    let straight = lab.path("run");
    type Damage = (&'static str, fn(&Path));
    let damage: [Damage; 4] = [
        ("adapter_model.safetensors", |path| {
            let mut bytes = std::fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            std::fs::write(path, bytes).unwrap();
        }),
        ("optimizer.safetensors", |path| {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() - 4]).unwrap();
        }),
        ("state.json", |path| std::fs::remove_file(path).unwrap()),
        ("MANIFEST.json", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (name, damage) in damage {
        let copy = lab.path(&format!("damaged-{name}"));
        copy_folder(&straight, &copy);
        std::fs::remove_dir_all(copy.join("adapter")).unwrap();
        std::fs::remove_dir_all(step_dir(&copy, 9)).unwrap();
        damage(&step_dir(&copy, 6).join(name));
        // What a kill while writing, or in the middle of a line, leaves.
        let half = copy.join("checkpoints/.incomplete-step-00000009");
        std::fs::create_dir(&half).unwrap();
        std::fs::write(half.join("adapter_model.safetensors"), b"half").unwrap();
        let mut lines = std::fs::read(copy.join("metrics.jsonl")).unwrap();
        lines.extend_from_slice(b"{\"step\":10,\"lo");
        std::fs::write(copy.join("metrics.jsonl"), lines).unwrap();

        let ran = resume(&copy).ok();
        let passed_over = step_dir(&copy, 6).display().to_string();
        assert!(ran.stderr.contains(&passed_over) && ran.stderr.contains("damaged"), "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains("goes on from step 3 of 9"), "{name}: {}", ran.stderr);
        assert!(!half.exists());
        assert_same_run(&format!("damaged {name}"), &copy, &straight);
        // The damaged one was written again.
        bellora::checkpoint::manifest::verify(&step_dir(&copy, 6)).unwrap();
    }
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_is_left_to_the_user() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let run_dir = lab.path("run");
    std::fs::remove_dir_all(run_dir.join("adapter")).unwrap();
    for step in [2, 4] {
        std::fs::write(step_dir(&run_dir, step).join("state.json"), "{}").unwrap();
    }
    let before = files(&run_dir);
    let ran = resume(&run_dir);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for step in [2, 4] {
        let place = step_dir(&run_dir, step).join("state.json").display().to_string();
        assert!(ran.stderr.contains(&place), "{place} is not named in: {}", ran.stderr);
    }
    assert!(ran.stderr.contains("hint:"), "{}", ran.stderr);
    assert!(files(&run_dir) == before, "a file has changed");
}

#[test]
fn a_run_without_a_checkpoint_starts_over() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=4"]);
    lab.run("train", &[], &[]).ok();
    let straight = lab.path("run");
    let copy = lab.path("copy");
    copy_folder(&straight, &copy);
    std::fs::remove_dir_all(copy.join("adapter")).unwrap();
    std::fs::remove_dir_all(copy.join("checkpoints")).unwrap();
    resume(&copy).ok();
    assert_same_run("no checkpoint", &copy, &straight);

    // `--resume` where there is nothing yet is a start.
    let fresh = lab.path("fresh");
    lab.run("train", &["--resume"], &[&format!("train.output={}", fresh.display())]).ok();
    assert_same_run("--resume of nothing", &fresh, &straight);
}

#[test]
fn a_finished_run_is_left_alone_and_a_missing_adapter_is_written() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let run_dir = lab.path("run");
    let before = files(&run_dir);

    let ran = lab.run("train", &[], &[]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("train.output") && ran.stderr.contains("holds a run"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint:") && ran.stderr.contains("bellora resume"), "{}", ran.stderr);
    for ran in [lab.run("train", &["--resume"], &[]), resume(&run_dir)] {
        assert!(ran.ok().stderr.contains("finished"));
    }
    assert!(files(&run_dir) == before, "a file has changed");

    // Killed after the last checkpoint, before the adapter.
    let copy = lab.path("copy");
    copy_folder(&run_dir, &copy);
    std::fs::remove_dir_all(copy.join("adapter")).unwrap();
    resume(&copy).ok();
    assert_same_run("adapter missing", &copy, &run_dir);
}

/// Nothing of a run may come after its last checkpoint but the adapter, or a kill in between would lose it.
#[test]
fn the_last_evaluation_stands_before_the_last_checkpoint() {
    let sets = ["train.max_steps=4", "train.checkpoint_every=4", "train.eval_every=3", "data.validation_fraction=0.2"];
    let lab = Lab::new(Shape::default()).with(&sets);
    lab.run("train", &[], &[]).ok();
    let run_dir = lab.path("run");
    let last = metrics(&run_dir).pop().unwrap();
    assert!(last["step"] == 4 && last.get("eval_loss").is_some(), "{last}");
    let changed = |path: &str| std::fs::metadata(run_dir.join(path)).unwrap().modified().unwrap();
    assert!(changed("metrics.jsonl") <= changed("checkpoints/step-00000004/MANIFEST.json"));
}

#[test]
fn what_defines_a_run_must_stay_and_the_rest_may_change() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=4", "train.checkpoint_every=2"]);
    lab.run("train", &[], &[]).ok();
    let straight = lab.path("run");
    let copy = lab.path("copy");
    copy_folder(&straight, &copy);
    std::fs::remove_dir_all(copy.join("adapter")).unwrap();
    std::fs::remove_dir_all(step_dir(&copy, 4)).unwrap();
    let output = format!("train.output={}", copy.display());
    let before = files(&copy);

    let other = lab.write_rows("other.jsonl", &rows(18, 9));
    let data = format!("data.train={}", other.display());
    let changed = ["train.learning_rate=0.5", "train.seed=7", &data, "lora.r=8", "train.log_every=2", &output];
    let ran = lab.run("train", &["--resume"], &changed);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for difference in ["train.learning_rate: is 0.5 here", "0.002", "train.seed", "data.train", "other.jsonl", "lora.r"]
    {
        assert!(ran.stderr.contains(difference), "{difference} is not named in: {}", ran.stderr);
    }
    assert!(!ran.stderr.contains("log_every"), "{}", ran.stderr);
    assert!(files(&copy) == before, "a file has changed");

    // The same names with other contents.
    for (key, path) in [("data.train", lab.path("rows.jsonl")), ("model.base", lab.path("base/model.safetensors"))] {
        let original = std::fs::read(&path).unwrap();
        let mut edited = original.clone();
        let at = edited.windows(5).rposition(|w| w == b"stone").unwrap_or(edited.len() - 3);
        edited[at] ^= 1;
        std::fs::write(&path, edited).unwrap();
        let ran = resume(&copy);
        assert_eq!(ran.code, Some(2), "{key}: {}", ran.stderr);
        assert!(ran.stderr.contains(key) && ran.stderr.contains("started with"), "{key}: {}", ran.stderr);
        assert!(files(&copy) == before, "{key}: a file has changed");
        std::fs::write(&path, original).unwrap();
    }

    let allowed = ["train.log_every=0", "train.micro_batch_tokens=200", "train.checkpoint_every=3", &output];
    lab.run("train", &["--resume"], &allowed).ok();
    assert_eq!(logged_steps(&copy), [1, 2, 3, 4]);
    for (ours, judge) in metrics(&copy).iter().zip(&metrics(&straight)) {
        let [ours, judge] = [ours, judge].map(|line| line["loss"].as_f64().unwrap());
        // Other micro-batches: rounding alone.
        assert!((ours - judge).abs() <= 1e-5, "{ours}, {judge}");
    }
}
