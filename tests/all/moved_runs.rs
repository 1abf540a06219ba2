//! Runs that are moved, that go on after a change, or that are only looked at.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::resume::{copy_folder, step_dir};
use crate::support::{Lab, Ran, Shape, bellora, golden_dir, metrics, rows, run};

fn call(command: &str, run_dir: &Path, arguments: &[&str]) -> Ran {
    run(bellora().arg(command).arg(run_dir).args(arguments))
}

#[track_caller]
fn says(ran: &Ran, words: &[&str]) {
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in: {}", ran.stderr);
    }
}

fn state(checkpoint: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(checkpoint.join("state.json")).unwrap()).unwrap()
}

/// The run of an older version in `tests/runs`, and the files that it was started with, in a folder of their own.
struct OldRun {
    dir: tempfile::TempDir,
}

impl OldRun {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runs/state_format_2");
        copy_folder(&kept, &dir.path().join("run"));
        copy_folder(&golden_dir().join("tied_gqa_llama3_rope"), &dir.path().join("case"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command on the run, told where its files lie by now.
    fn call(&self, command: &str, arguments: &[&str]) -> Ran {
        let mut process = bellora();
        process.arg(command).arg(self.path("run")).args(arguments);
        for (key, name) in [
            ("model.base", "base"),
            ("model.tokenizer", "tokenizer"),
            ("data.train", "data.jsonl"),
            ("data.validation", "validation.jsonl"),
        ] {
            process.arg("--set").arg(format!("{key}={}", self.path("case").join(name).display()));
        }
        run(&mut process)
    }
}

/// Its checkpoint has format 2: the base as a checksum, with the ends of a text in it, and no key that came later.
#[test]
fn a_checkpoint_of_format_2_goes_on() {
    let old = OldRun::new();
    let losses = |lines: Vec<Value>| -> Vec<f64> { lines.iter().filter_map(|line| line["loss"].as_f64()).collect() };
    let theirs = losses(metrics(&old.path("run")));
    // A file that says nothing about what is computed has come since.
    std::fs::write(old.path("case/base/generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    let ran = old.call("resume", &[]).ok();
    says(&ran, &["goes on from step 2 of 4"]);
    assert!(!ran.stderr.contains("allow_config_keys"), "a key that the run did not know is no change: {}", ran.stderr);
    let ours = losses(metrics(&old.path("run")));
    assert_eq!(ours.len(), theirs.len());
    // To rounding: the run was made on another machine.
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours - theirs).abs() < 1e-5, "{ours} {theirs}");
    }
    let newest = state(&step_dir(&old.path("run"), 4));
    assert_eq!(newest["format_version"], 3);
    assert_eq!(newest["identity"]["base"]["rope_scaling"]["rope_type"], "llama3");
}

#[test]
fn a_checkpoint_of_format_2_is_held_against_its_base() {
    let old = OldRun::new();
    let path = old.path("case/base/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["rms_norm_eps"] = json!(1e-6);
    std::fs::write(&path, config.to_string()).unwrap();
    let ran = old.call("resume", &[]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    says(&ran, &["the base model is not what the run", "its checksum is another"]);
}

#[test]
fn a_base_is_told_by_named_values() {
    let lab = Lab::new(Shape::default()).with(&["train.checkpoint_every=2", "train.max_steps=2"]);
    lab.run("train", &[], &[]).ok();
    let path = lab.path("base/config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let with = |changes: &[(&str, Value)]| {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        std::fs::write(&path, config.to_string()).unwrap();
        call("resume", &lab.path("run"), &["--set", "train.max_steps=3"])
    };
    let other = with(&[("rms_norm_eps", json!(1e-6)), ("rope_theta", json!(5e5))]);
    assert_eq!(other.code, Some(2), "{}", other.stderr);
    says(&other, &["rms_norm_eps is 1e-6 here and was 0.00001", "rope_theta is 500000.0 here and was 10000.0"]);
    // None of these changes what is computed.
    std::fs::write(lab.path("base/generation_config.json"), r#"{"eos_token_id": [2, 9]}"#).unwrap();
    let harmless =
        [("eos_token_id", json!([2, 5])), ("max_position_embeddings", json!(4096)), ("use_cache", json!(false))];
    says(&with(&harmless).ok(), &["goes on from step 2 of 3"]);
}

#[test]
fn only_places_that_are_written_are_judged() {
    // Each of the old places lies below a file now, so that nobody can write there, not even root.
    let lab = Lab::new(Shape::default()).with(&["train.checkpoint_every=1", "train.max_steps=2"]);
    std::fs::create_dir(lab.path("old")).unwrap();
    let old = |name: &str| lab.path("old").join(name).display().to_string();
    let sets = [format!("train.output={}", old("run")), format!("data.cache_dir={}", old("cache"))];
    lab.run("train", &[], &[&sets[0], &sets[1]]).ok();
    let moved = lab.path("moved");
    copy_folder(&lab.path("old/run"), &moved);
    std::fs::remove_dir_all(lab.path("old")).unwrap();
    std::fs::write(lab.path("old"), "a file").unwrap();

    says(&call("replay", &moved, &["--step", "2"]).ok(), &["bit for bit"]);
    let rows = format!("data.validation={}", lab.path("rows.jsonl").display());
    call("eval", &moved, &["--set", &rows]).ok();
    let ran = call("resume", &moved, &["--set", "train.max_steps=4"]).ok();
    says(&ran, &["warning: ", "data.cache_dir: expected a folder", "goes on from step 2 of 4"]);
    assert_eq!(metrics(&moved).len(), 4);

    // A folder that is asked for now is another matter, and so is an output that a new run would write.
    for set in [&sets[1], &sets[0]] {
        for command in ["check", "train"] {
            let ran = lab.run(command, &[], &[set]);
            assert_eq!(ran.code, Some(2), "{command} {set}: {}", ran.stderr);
            says(&ran, &[&format!("--set {set}"), "is a file"]);
        }
    }
    let ran = call("resume", &moved, &["--set", "train.max_steps=5", "--set", &sets[1]]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert_eq!(metrics(&moved).len(), 4, "nothing is touched");
}

#[test]
fn a_default_cache_folder_that_cannot_be_used_costs_a_warning() {
    let lab = Lab::new(Shape::default()).with(&["train.max_steps=1"]);
    let config = std::fs::read_to_string(lab.config_file()).unwrap();
    let without: String =
        config.lines().filter(|line| !line.starts_with("cache_dir")).map(|l| format!("{l}\n")).collect();
    std::fs::write(lab.path("own.toml"), without).unwrap();
    std::fs::write(lab.path("file"), "").unwrap();
    let call = |command: &str, more: &[&str]| {
        run(bellora()
            .arg(command)
            .arg(lab.path("own.toml"))
            .args(more)
            .args(["--set", "train.max_steps=1"])
            .env("XDG_CACHE_HOME", lab.path("file")))
    };
    let checked = call("check", &[]).ok();
    assert!(checked.stdout.contains("warning: ") && checked.stdout.contains("data.cache_dir"), "{}", checked.stdout);
    says(&call("train", &[]).ok(), &["warning: ", "data.cache_dir"]);
    let prepared = call("prepare", &[]);
    assert_eq!(prepared.code, Some(2), "what is asked for cannot be had: {}", prepared.stderr);
    let dump = lab.path("dump.jsonl");
    says(&call("prepare", &["--dump", dump.to_str().unwrap()]).ok(), &["warning: "]);
}

#[test]
fn check_plan_and_eval_read_the_token_cache_and_write_none() {
    let lab = Lab::new(Shape::default()).with(&["data.validation_fraction=0.3"]);
    let is_cached = |ran: &Ran| ran.stdout.contains("from the token cache");
    for command in ["check", "plan", "eval"] {
        assert!(!is_cached(&lab.run(command, &[], &[]).ok()));
        assert!(!lab.path("cache").exists(), "{command} wrote tokens");
    }
    lab.run("prepare", &[], &[]).ok();
    assert!(is_cached(&lab.run("check", &[], &[]).ok()));
    for command in ["plan", "eval"] {
        let cached = lab.path("cache");
        let before = std::fs::read_dir(&cached).unwrap().count();
        lab.run(command, &[], &[]).ok();
        assert_eq!(std::fs::read_dir(&cached).unwrap().count(), before, "{command} wrote tokens");
    }
}

#[test]
fn a_run_stays_in_its_folder() {
    let lab = Lab::new(Shape::default()).with(&["train.checkpoint_every=1", "train.max_steps=2"]);
    lab.run("train", &[], &[]).ok();
    let elsewhere = lab.path("elsewhere");
    let set = format!("train.output={}", elsewhere.display());
    for (command, more) in
        [("resume", &["--set", "train.max_steps=3"][..]), ("replay", &["--step", "1"]), ("eval", &[])]
    {
        let ran = call(command, &lab.path("run"), &[more, &["--set", &set]].concat());
        assert_eq!(ran.code, Some(2), "{command}: {}", ran.stderr);
        says(&ran, &[&format!("--set {set}"), "stays in its folder", "move the folder"]);
    }
    assert!(!elsewhere.exists());
    assert_eq!(metrics(&lab.path("run")).len(), 2);
    // Its own folder, in other words.
    let itself = format!("train.output = {}/./run/", lab.path("").display());
    call("resume", &lab.path("run"), &["--set", &itself, "--set", "train.max_steps=3"]).ok();
    assert_eq!(metrics(&lab.path("run")).len(), 3);
}

#[test]
fn other_validation_samples_are_noticed() {
    let lab = Lab::new(Shape::default()).with(&["train.checkpoint_every=1", "train.max_steps=1"]);
    let held_out = lab.write_rows("held_out.jsonl", &rows(3, 9));
    let validation = format!("data.validation={}", held_out.display());
    lab.run("train", &[], &[&validation]).ok();
    let resume = |steps: &str| call("resume", &lab.path("run"), &["--set", steps]).ok();
    let same = resume("train.max_steps=2");
    assert!(!same.stderr.contains("validation samples are not those"), "{}", same.stderr);
    lab.write_rows("held_out.jsonl", &rows(3, 10));
    says(&resume("train.max_steps=3"), &["the validation samples are not those of the run so far"]);
    // The checkpoint since then knows the new ones.
    assert!(!resume("train.max_steps=4").stderr.contains("validation samples are not those"));
}

#[test]
fn a_run_without_a_checkpoint_begins_again_and_says_so() {
    let lab = Lab::new(Shape::default()).with(&["train.checkpoint_every=0", "train.max_steps=3"]);
    lab.run("train", &[], &[]).ok();
    let dir = lab.path("run");
    // As a kill before the end leaves it.
    std::fs::remove_dir_all(dir.join("adapter")).unwrap();
    assert!(!dir.join("checkpoints").exists() || std::fs::remove_dir_all(dir.join("checkpoints")).is_ok());
    let before = std::fs::read(dir.join("metrics.jsonl")).unwrap();
    let ran = call("resume", &dir, &[]).ok();
    says(&ran, &["warning: there is no checkpoint to go on from, so the run begins again; 3 lines", "metrics-1.jsonl"]);
    assert_eq!(std::fs::read(dir.join("metrics-1.jsonl")).unwrap(), before);
    assert_eq!(metrics(&dir).len(), 3);
    std::fs::remove_dir_all(dir.join("adapter")).unwrap();
    let _ = std::fs::remove_dir_all(dir.join("checkpoints"));
    says(&call("resume", &dir, &[]).ok(), &["metrics-2.jsonl"]);
    assert_eq!(std::fs::read(dir.join("metrics-1.jsonl")).unwrap(), before);
    call("verify", &dir, &[]).ok();
}
