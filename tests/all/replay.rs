//! `replay`: every update of a run again, from wherever a checkpoint is left, bit for bit; and what it refuses.

use std::collections::BTreeMap;
use std::path::Path;

use bellora::engine::non_finite::json_line;
use bellora::error::Error;
use bellora::run::replay::{Recorded, Replay};
use serde_json::Value;
use tch::Tensor;

use crate::non_finite;
use crate::resume::{files, step_dir};
use crate::support::{Lab, Named, Shape, bellora, metrics, read_tensors, rows, run, snapshot};

/// Copies a run with some of its checkpoints.
fn copy_run(from: &Path, to: &Path, kept: &[u64]) {
    for (path, contents) in files(from) {
        let relative = path.strip_prefix(from).unwrap();
        let is_kept = |step: &u64| relative.starts_with(step_dir(Path::new(""), *step));
        if !relative.starts_with("checkpoints") || kept.iter().any(is_kept) {
            let path = to.join(relative);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, contents).unwrap();
        }
    }
}

/// The lines of `metrics.jsonl` that tell of updates.
fn updates(run_dir: &Path) -> Vec<Value> {
    metrics(run_dir).into_iter().filter(|line| line.get("loss").is_some()).collect()
}

fn open(run_dir: &Path, step: u64) -> Result<Replay, Error> {
    // As many threads as the run had: sums have one order then.
    tch::set_num_threads(1);
    Replay::open(run_dir, step, &[])
}

/// The parameters and moments of a checkpoint.
fn of_checkpoint(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut tensors = read_tensors(&dir.join("adapter_model.safetensors"));
    tensors.extend(read_tensors(&dir.join("optimizer.safetensors")));
    tensors
}

fn of_trainer(replay: &Replay) -> Named {
    let trainer = &replay.trainer;
    snapshot(&trainer.params)
        .into_iter()
        .chain(trainer.optimizer.named_moments(trainer.params.layout()).unwrap())
        .collect()
}

/// Trains with a checkpoint after every step, then replays each step from copies that have hardly any checkpoint left.
#[track_caller]
fn every_step_is_the_same(what: &str, lab: &Lab, n_steps: u64) -> Vec<Value> {
    lab.run("train", &[], &["train.keep_checkpoints=100", "train.checkpoint_every=1"]).ok();
    let run_dir = lab.path("run");
    let sparse = lab.path("sparse");
    copy_run(&run_dir, &sparse, &[2, n_steps - 2]);
    let lines = updates(&run_dir);
    assert_eq!(lines.len() as u64, n_steps);
    for (step, line) in (1..=n_steps).zip(&lines) {
        let what = format!("{what}, step {step}");
        let mut replay = open(&sparse, step).unwrap();
        let from = [n_steps - 2, 2].into_iter().find(|kept| *kept < step);
        assert_eq!(replay.from, from.map(|kept| step_dir(&sparse, kept)), "{what}");
        let mut on_the_way = Vec::new();
        replay.catch_up(|metrics| on_the_way.push(metrics.step)).unwrap();
        assert_eq!(on_the_way, (from.unwrap_or_default() + 1..step).collect::<Vec<_>>(), "{what}");
        let replayed = replay.replay().unwrap();
        assert_eq!(replayed.recorded, Recorded::Same, "{what}");
        // As texts of the same reading: it may be off by the last bit.
        let ours: Value = serde_json::from_str(&json_line(&replayed.line)).unwrap();
        for (key, value) in ours.as_object().unwrap() {
            assert_eq!(value, &line[key], "{what}: {key}");
        }
        assert_eq!(replayed.line.len(), line.as_object().unwrap().len() - 2, "{what}: all but two keys of a clock");

        let judge = of_checkpoint(&step_dir(&run_dir, step));
        let ours = of_trainer(&replay);
        assert_eq!(ours.len(), judge.len(), "{what}");
        for (name, tensor) in ours {
            assert!(tensor.equal(&judge[&name]), "{what}: {name} differs");
        }

        // The samples make up the update: their number, their tokens, and their losses to rounding.
        let sum = |value: &dyn Fn(usize) -> f64| (0..replayed.samples.len()).map(value).sum::<f64>();
        let samples = &replayed.samples;
        assert_eq!(line["samples"], samples.len(), "{what}");
        assert_eq!(line["tokens"], sum(&|i| samples[i].tokens as f64) as u64, "{what}");
        let label_tokens = sum(&|i| samples[i].label_tokens as f64);
        assert_eq!(line["label_tokens"], label_tokens as u64, "{what}");
        assert!(samples.iter().enumerate().all(|(slot, s)| (s.step, s.slot) == (step, slot)), "{what}: {samples:?}");
        if let Some(loss) = line["loss"].as_f64() {
            let mean = sum(&|i| samples[i].loss.unwrap() * samples[i].label_tokens as f64) / label_tokens;
            // In half precision the products of a micro-batch of another size may be rounded otherwise.
            let bound = if what.starts_with("fp32") { 1e-6 } else { 1e-3 };
            assert!((mean - loss).abs() <= bound * loss, "{what}: {mean}, {loss}");
        }
    }
    lines
}

/// With evaluations between the updates, whose lines have numbers of the same names.
const UNEVEN: [&str; 7] = [
    "lora.dropout=0.1",
    "data.shuffle=true",
    "data.validation_fraction=0.06",
    "train.eval_every=1",
    "train.micro_batch_tokens=200",
    "train.epochs=2",
    "train.warmup_steps=2",
];

fn uneven(dtype: &str) -> Lab {
    Lab::new(Shape::default()).with(&UNEVEN).with(&[&format!("model.dtype={dtype}")]).with_init_adapter()
}

#[test]
fn dropout_accumulation_and_epochs_in_fp32() {
    let lines = every_step_is_the_same("fp32", &uneven("fp32"), 10);
    let samples: Vec<_> = lines.iter().map(|line| line["samples"].as_u64().unwrap()).collect();
    assert_eq!(samples, [4, 4, 4, 4, 1, 4, 4, 4, 4, 1]);
}

#[test]
fn bf16() {
    every_step_is_the_same("bf16", &uneven("bf16"), 10);
}

#[test]
fn fp16_with_overflows() {
    let lab = Lab::overflowing().with(&["train.max_steps=9", "lora.dropout=0.1"]);
    let lines = every_step_is_the_same("fp16", &lab, 9);
    let skipped: Vec<bool> = lines.iter().map(|line| line["skipped"].as_bool().unwrap()).collect();
    assert!(skipped[0] && skipped[1] && !skipped[8], "{skipped:?}");
}

/// `bellora replay`: exit code, the lines of stdout, stderr.
fn replay(run_dir: &Path, step: &str) -> (Option<i32>, Vec<Value>, String) {
    replay_with(run_dir, step, &[])
}

fn replay_with(run_dir: &Path, step: &str, more: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let output = bellora().arg("replay").arg(run_dir).args(["--step", step]).args(more).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.code(), lines, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_command_prints_samples_and_the_line_and_changes_nothing() {
    let lab = uneven("fp32");
    lab.run("train", &[], &["train.checkpoint_every=4", "train.keep_checkpoints=9"]).ok();
    let run_dir = lab.path("run");
    let before = files(&run_dir);
    let recorded = updates(&run_dir);
    let (code, lines, stderr) = replay(&run_dir, "7");
    assert_eq!((code, lines.len()), (Some(0), 5), "{stderr}");
    assert!(stderr.contains(&format!("from {}", step_dir(&run_dir, 4).display())), "{stderr}");
    assert!(stderr.contains("step 5 is done again") && stderr.contains("step 6 is done again"), "{stderr}");
    assert!(stderr.contains("step 7 is the same as in metrics.jsonl, bit for bit"), "{stderr}");
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    for (slot, line) in lines[..4].iter().enumerate() {
        assert_eq!(keys(line), ["step", "place", "slot", "tokens", "label_tokens", "loss"]);
        assert!(line["step"] == 7 && line["slot"] == slot && line["loss"].as_f64().unwrap() > 0.0, "{line}");
        assert!(line["place"].as_str().unwrap().contains("rows.jsonl:"), "{line}");
    }
    let of_metrics = ["step", "loss", "grad_norm", "lr", "samples", "tokens", "label_tokens", "loss_scale", "skipped"];
    assert_eq!(keys(&lines[4]), of_metrics);
    assert!(of_metrics.iter().all(|key| lines[4][key] == recorded[6][key]), "{}", lines[4]);
    assert!(files(&run_dir) == before, "a file has changed");

    // Before any checkpoint; and a line that has changed, is torn, or is not there.
    let (_, _, stderr) = replay(&run_dir, "3");
    assert!(stderr.contains("from the start of the run") && stderr.contains("bit for bit"), "{stderr}");
    let path = run_dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    // An evaluation stands between the updates.
    let norm = text.lines().nth(2).unwrap().split_once("\"grad_norm\":").unwrap().1.split(',').next().unwrap();
    std::fs::write(&path, text.replace(&format!("\"grad_norm\":{norm}"), "\"grad_norm\":7.5")).unwrap();
    let (code, lines, stderr) = replay(&run_dir, "2");
    assert_eq!((code, lines.len()), (Some(0), 5), "{stderr}");
    assert!(
        stderr.contains(&format!("not the same as in metrics.jsonl: grad_norm {norm} here, 7.5 there\n")),
        "{stderr}"
    );
    assert!(stderr.contains("  hint: sums are rounded otherwise"), "{stderr}");
    // With more threads the losses may be the same or not; the line above is not.
    let mut more = bellora();
    let output = more.env("OMP_NUM_THREADS", "2").arg("replay").arg(&run_dir).args(["--step", "2"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("  hint: it computes on cpu with 2 threads here, and the run on cpu with 1"), "{stderr}");
    let torn = text.find("{\"step\":2,").unwrap() + 20;
    for kept in [&text[..torn], ""] {
        std::fs::write(&path, kept).unwrap();
        let (code, _, stderr) = replay(&run_dir, "2");
        assert!(code == Some(0) && stderr.contains("no line of step 2"), "{stderr}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(replay(&run_dir, "2").2.contains("no line of step 2"));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_a_later_one_is_not_looked_at() {
    let lab = uneven("fp32");
    lab.run("train", &[], &["train.checkpoint_every=2", "train.keep_checkpoints=9"]).ok();
    let run_dir = lab.path("run");
    for (step, name) in [(6, "optimizer.safetensors"), (8, "state.json"), (10, "adapter_model.safetensors")] {
        let path = step_dir(&run_dir, step).join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let (code, _, stderr) = replay(&run_dir, "8");
    assert_eq!(code, Some(0), "{stderr}");
    let damaged = format!("{} is damaged and was passed over", step_dir(&run_dir, 6).display());
    assert!(stderr.contains(&damaged) && !stderr.contains("step-00000008"), "{stderr}");
    assert!(stderr.contains(&format!("from {}", step_dir(&run_dir, 4).display())), "{stderr}");
    assert!(stderr.contains("bit for bit"), "{stderr}");
}

#[test]
fn what_is_no_step_of_the_run_or_no_longer_the_run_is_refused() {
    let lab = uneven("fp32");
    lab.run("train", &[], &["train.checkpoint_every=2"]).ok();
    let run_dir = lab.path("run");
    for step in ["0", "11", "18446744073709551615"] {
        let (code, lines, stderr) = replay(&run_dir, step);
        assert_eq!((code, lines.len()), (Some(2), 0), "{stderr}");
        assert!(
            stderr.contains(&format!("no step {step}")) && stderr.contains("hint: name one from 1 to 10"),
            "{stderr}"
        );
    }
    let (code, _, stderr) = replay(&lab.path("base"), "1");
    assert!(code == Some(2) && stderr.contains("holds no run") && stderr.contains("hint: "), "{stderr}");
    let (code, _, stderr) = replay(&run_dir, "one");
    assert_eq!(code, Some(2), "{stderr}");

    for (key, path) in [("data.train", lab.path("rows.jsonl")), ("model.base", lab.path("base/model.safetensors"))] {
        let original = std::fs::read(&path).unwrap();
        let mut edited = original.clone();
        let at = edited.windows(5).rposition(|w| w == b"stone").unwrap_or(edited.len() - 3);
        edited[at] ^= 1;
        std::fs::write(&path, edited).unwrap();
        // From a checkpoint, and from the start, where a later one knows.
        for step in ["9", "1"] {
            let (code, lines, stderr) = replay(&run_dir, step);
            assert_eq!((code, lines.len()), (Some(2), 0), "{key}: {stderr}");
            assert!(stderr.contains(key) && stderr.contains("started with"), "{key}: {stderr}");
        }
        std::fs::write(&path, original).unwrap();
    }
    let (code, _, stderr) = replay(&run_dir, "9");
    assert!(code == Some(0) && stderr.contains("bit for bit"), "{stderr}");
}

/// Checkpoints come and go while they are looked for.
#[test]
fn a_run_that_goes_on_can_be_replayed() {
    let lab = uneven("fp32").with(&["train.epochs=20", "train.checkpoint_every=1", "train.keep_checkpoints=1"]);
    let run_dir = lab.path("run");
    let mut child = lab.command("train", &[], &[]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let has_begun = || step_dir(&run_dir, 1).exists() || step_dir(&run_dir, 2).exists();
    while !has_begun() {
        assert_eq!(child.try_wait().unwrap(), None, "the run ended before it was looked at");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let mut n_replayed = 0;
    while child.try_wait().unwrap().is_none() {
        let mut replay = open(&run_dir, 20).unwrap();
        assert_eq!(replay.damaged.len(), 0, "{:?}", replay.damaged);
        replay.catch_up(|_| ()).unwrap();
        let recorded = replay.replay().unwrap().recorded;
        assert!(matches!(recorded, Recorded::Same | Recorded::Nothing), "{recorded:?}");
        n_replayed += 1;
    }
    assert!(n_replayed > 0 && child.wait().unwrap().success());
    assert_eq!(updates(&run_dir).len(), 100);
}

/// The step that ended a run is the one that is worth a look.
#[test]
fn a_step_that_is_not_finite_can_be_replayed() {
    let lab = non_finite::lab("fp32", f32::NAN, 8, &[2, 6]);
    let run_dir = lab.path("run");
    // The first such step is passed over, the second ends the run.
    let ran = lab.run("train", &[], &["train.non_finite=skip", "train.max_non_finite=1", "train.checkpoint_every=2"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for (step, verdict) in [("1", "bit for bit"), ("2", "bit for bit"), ("3", "no line of step 3")] {
        let (code, lines, stderr) = replay(&run_dir, step);
        assert_eq!((code, lines.len()), (Some(0), 3), "{stderr}");
        assert!(stderr.contains(verdict), "{stderr}");
        let is_bad = step != "2";
        assert!(lines[0]["loss"].is_f64() && lines[1]["loss"].is_f64() != is_bad, "{lines:?}");
        assert!(!is_bad || lines[1]["loss"] == "NaN", "{lines:?}");
        assert!(lines[2]["skipped"] == is_bad && lines[2]["loss"].is_null() == is_bad, "{lines:?}");
    }
}

/// A run that goes on may be longer than it was meant to be, which changes its learning rates, and have other micro-batches:
/// the steps before are those of the config that they had.
#[test]
fn every_step_has_the_config_that_it_had_then() {
    let lab = uneven("fp32");
    let run_dir = lab.path("run");
    lab.run("train", &[], &["train.epochs=1", "train.checkpoint_every=2", "train.keep_checkpoints=9"]).ok();
    let longer = ["--set", "train.epochs=2", "--set", "train.micro_batch_tokens=4096"];
    run(bellora().arg("resume").arg(&run_dir).args(longer)).ok();
    let lines = updates(&run_dir);
    assert_eq!(lines.len(), 10);
    // Another length is another rate, and so it would show.
    assert!(lines[4]["lr"].as_f64() < lines[5]["lr"].as_f64(), "{lines:?}");
    for step in 1..=10 {
        let mut replay = open(&run_dir, step).unwrap();
        replay.catch_up(|_| ()).unwrap();
        assert_eq!(replay.replay().unwrap().recorded, Recorded::Same, "step {step}");
    }
    // Without a checkpoint after it a step is thought to be one of the newest config.
    std::fs::remove_dir_all(run_dir.join("checkpoints")).unwrap();
    let mut replay = open(&run_dir, 5).unwrap();
    replay.catch_up(|_| ()).unwrap();
    let Recorded::Others(others) = replay.replay().unwrap().recorded else { panic!("it cannot be the same") };
    assert!(others.iter().any(|(key, ..)| key == "lr"), "{others:?}");

    // What the run read may have moved; and a key may be tried out.
    std::fs::rename(lab.path("base"), lab.path("moved")).unwrap();
    let (code, _, stderr) = replay_with(&run_dir, "1", &[]);
    assert!(code == Some(2) && stderr.contains("model.base"), "{stderr}");
    let sets = ["base", "tokenizer"].map(|key| format!("model.{key}={}", lab.path("moved").display()));
    let (code, _, stderr) =
        replay_with(&run_dir, "1", &["--set", &sets[0], "--set", &sets[1], "--set", "train.epochs=1"]);
    assert!(code == Some(0) && stderr.contains("not the same"), "{stderr}");
}

#[test]
fn an_update_with_nothing_to_learn_can_be_replayed() {
    let lab = Lab::new(Shape::default()).with(&["data.truncation=cut", "train.global_batch=1", "train.max_steps=3"]);
    let mut data = rows(3, 2);
    data[1].0 = "stone ".repeat(200);
    lab.write_rows("rows.jsonl", &data);
    lab.run("train", &[], &[]).ok();
    let (code, lines, stderr) = replay(&lab.path("run"), "2");
    assert!(code == Some(0) && stderr.contains("bit for bit"), "{stderr}");
    assert_eq!((lines.len(), &lines[0]["label_tokens"], &lines[0]["loss"]), (2, &Value::from(0), &Value::Null));
    assert!(lines[1]["skipped"] == true && lines[1]["loss"].is_null(), "{lines:?}");
}
