//! Losses and gradients that are not finite, made by a token whose embedding is not: then exactly the samples that hold it
//! fail, in every dtype. And gradients that overflow while every loss is in order.

use std::path::Path;

use bellora::checkpoint::adapter_file::WEIGHTS_FILE;
use bellora::engine::metrics::StepMetrics;
use bellora::engine::non_finite::{NonFinite, SampleLoss};
use bellora::engine::optim::loss_scale::LossScale;
use bellora::engine::step::Trainer;
use serde_json::{Value, json};

use crate::fp16::token_id;
use crate::resume::straight_equals_resumed;
use crate::support::{
    Lab, Named, Rig, Shape, bellora, metrics, read_tensors, rows, run, snapshot, trainer, trainer_at, write_tensors,
};

/// What stands in a table for a number that is too large for a dtype, or for none.
const EMBEDDINGS: [(&str, f32); 4] = [("fp32", f32::NAN), ("bf16", f32::NAN), ("bf16", f32::MAX), ("fp16", 100_000.0)];

/// Changes tensors of a file.
fn rewrite(path: &Path, change: impl Fn(&str, &tch::Tensor)) {
    let named: Named = read_tensors(path).into_iter().collect();
    named.iter().for_each(|(name, tensor)| change(name, tensor));
    write_tensors(path, &named);
}

/// A job of `n` samples, two an update in file order, in which those of the lines `bad` (from 1) are not finite.
pub(crate) fn lab(dtype: &str, embedding: f32, n: usize, bad: &[usize]) -> Lab {
    let dtype = format!("model.dtype={dtype}");
    let n_steps = format!("train.max_steps={}", n / 2);
    let sets = [&dtype, &n_steps, "train.global_batch=2", "train.checkpoint_every=1", "lora.dropout=0.1"];
    let lab = Lab::new(Shape::default()).with(&sets).with_init_adapter();
    rewrite(&lab.path("base/model.safetensors"), |name, tensor| {
        if name == "model.embed_tokens.weight" {
            let _ = tensor.narrow(0, token_id(), 1).fill_(f64::from(embedding));
        }
    });
    let mut data = rows(n, 3);
    for line in bad {
        data[line - 1].1.insert_str(0, "~ ");
    }
    lab.write_rows("rows.jsonl", &data);
    lab
}

/// In fp16 at the smallest loss scale; in other dtypes there is no other.
fn trainer_of(lab: &Lab, dtype: &str, sets: &[&str]) -> Rig {
    let scale: LossScale = serde_json::from_value(json!({ "scale": 1.0, "good_updates": 0, "dynamic": true })).unwrap();
    trainer_at(lab.config(sets), |state| {
        if dtype == "fp16" {
            state.loss_scale = scale;
        }
    })
}

/// The lines of the samples whose own losses are not finite.
fn bad_lines(found: &NonFinite) -> Vec<usize> {
    let bad = found.samples.iter().filter(|sample| !sample.loss.unwrap().is_finite());
    bad.map(|sample| sample.place.rsplit(':').next().unwrap().parse().unwrap()).collect()
}

/// Parameters and moments.
fn tensors(trainer: &Rig) -> Named {
    let moments = trainer.optimizer.named_moments(trainer.params.layout()).unwrap();
    snapshot(&trainer.params).into_iter().chain(moments.into_iter().map(|(name, m)| (name, m.copy()))).collect()
}

#[track_caller]
fn assert_same(what: &str, ours: &Named, judge: &Named) {
    for ((name, a), (_, b)) in ours.iter().zip(judge) {
        assert!(a.equal(b), "{what}: {name} differs");
    }
    assert_eq!(ours.len(), judge.len());
}

#[test]
fn with_stop_the_step_is_an_error_that_names_the_sample_and_changes_nothing() {
    for (dtype, embedding) in EMBEDDINGS {
        let what = format!("{dtype}, {embedding}");
        let lab = lab(dtype, embedding, 8, &[6]);
        let mut trainer = trainer_of(&lab, dtype, &[]);
        for _ in 0..2 {
            assert!(!trainer.step().unwrap().skipped, "{what}");
            assert_eq!(trainer.take_non_finite(), None, "{what}");
        }
        let before = tensors(&trainer);
        let error = trainer.step().unwrap_err();
        assert_same(&what, &tensors(&trainer), &before);
        assert_eq!(error.exit_code(), 1);
        let (text, hint) = (error.to_string(), &error.faults()[0].hint);
        assert!(text.starts_with("step 3: ") && text.contains("not finite"), "{what}: {text}");
        assert!(text.contains("by itself the loss of ") && text.contains("rows.jsonl:6; the step was not"), "{text}");
        assert!(!text.contains("rows.jsonl:5"), "{what}: {text}");
        assert!(hint.contains("train.non_finite = \"skip\"") && hint.contains("rows.jsonl:5, "), "{what}: {hint}");

        let found = trainer.take_non_finite().unwrap();
        assert_eq!(trainer.take_non_finite(), None, "told once");
        assert!(found.ends_the_run() && (found.step, found.nth, found.allowed) == (3, 1, 0), "{found:?}");
        assert!(!found.loss.is_finite() && found.steps_since == 0 && found.loss_scale == 1.0, "{found:?}");
        assert_eq!(bad_lines(&found), [6], "{what}");
        for (slot, sample) in found.samples.iter().enumerate() {
            let of = 4 + slot;
            assert_eq!((sample.step, sample.slot, &sample.place), (3, slot, &trainer.job.train.place(of)), "{what}");
            let (ids, learned) = (trainer.job.train.ids(of), trainer.job.train.label_tokens(of));
            assert_eq!((sample.tokens, sample.label_tokens), (ids.len(), learned), "{what}");
        }

        // As a file: a line of the step, then one a sample.
        let lines: Vec<Value> = found.to_json_lines().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        let is_word = |value: &Value| ["NaN", "inf", "-inf"].iter().any(|word| value == word);
        assert!(lines[0]["step"] == 3 && is_word(&lines[0]["loss"]) && lines[0]["samples"] == 2, "{}", lines[0]);
        assert_eq!(lines[1]["loss"].as_f64(), found.samples[0].loss, "{what}");
        assert!(lines[2]["slot"] == 1 && is_word(&lines[2]["loss"]), "{}", lines[2]);
        assert!(lines[2]["place"].as_str().unwrap().ends_with("rows.jsonl:6"), "{}", lines[2]);
    }
}

/// Does all steps of a job; gives their metrics without what a clock says, the steps that were passed over and the end.
fn run_to_end(trainer: &mut Rig, steps_ahead: usize) -> (Vec<String>, Vec<NonFinite>, Named) {
    trainer.steps_ahead = steps_ahead;
    let untimed = |m: StepMetrics| format!("{:?}", StepMetrics { step_secs: 0.0, tokens_per_s: 0.0, ..m });
    let (mut lines, mut found) = (Vec::new(), Vec::new());
    while trainer.state.step < trainer.job.total_steps {
        lines.extend(Trainer::step(trainer).unwrap().map(untimed));
        found.extend(trainer.take_non_finite());
    }
    lines.extend(trainer.finish().unwrap().map(untimed));
    found.extend(trainer.take_non_finite());
    (lines, found, tensors(trainer))
}

#[test]
fn with_skip_the_update_is_passed_over_and_nothing_else() {
    for (dtype, embedding) in EMBEDDINGS {
        let what = format!("{dtype}, {embedding}");
        // Two that adjoin, and the last step.
        let lab = lab(dtype, embedding, 14, &[5, 7, 8, 13]);
        let skip = ["train.non_finite=skip", "train.max_non_finite=3"];
        let mut trainer = trainer_of(&lab, dtype, &skip);
        let mut updates = 0;
        for step in 1..=7 {
            let before = tensors(&trainer);
            let line = trainer.step().unwrap();
            let is_bad = [3, 4, 7].contains(&step);
            assert_eq!((line.step, line.skipped), (step, is_bad), "{what}");
            assert_eq!(line.lr, trainer.job.schedule.lr(updates), "{what}: the schedule waits");
            let found = trainer.take_non_finite();
            assert_eq!(found.is_some(), is_bad, "{what}");
            if let Some(found) = found {
                assert_same(&what, &tensors(&trainer), &before);
                assert_eq!((found.step, found.nth, found.allowed), (step, trainer.state.non_finite, 3), "{what}");
                let expected: &[usize] = if step == 3 {
                    &[5]
                } else if step == 4 {
                    &[7, 8]
                } else {
                    &[13]
                };
                assert_eq!(bad_lines(&found), expected, "{what}");
                let warning = found.warning();
                assert!(
                    warning.contains(&format!("step {step} was passed over, {} of at most 3", found.nth)),
                    "{warning}"
                );
                assert!(warning.contains(&format!("rows.jsonl:{}", expected[0])), "{warning}");
            } else {
                updates += 1;
            }
            assert_eq!((trainer.state.step, trainer.state.updates), (step, updates), "{what}");
        }
        assert_eq!(trainer.state.non_finite, 3, "{what}");

        // One more than allowed.
        let mut trainer = trainer_of(&lab, dtype, &["train.non_finite=skip", "train.max_non_finite=2"]);
        assert_eq!((0..6).filter(|_| trainer.step().unwrap().skipped).count(), 2, "{what}");
        let error = trainer.step().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("step 7") && text.contains("train.max_non_finite = 2"), "{what}: {text}");
        let found = trainer.take_non_finite().unwrap();
        assert!(found.ends_the_run() && (found.nth, found.allowed) == (3, 2), "{found:?}");
        assert_eq!(trainer.state.non_finite, 2, "{what}");
    }
}

#[test]
fn outcomes_that_come_late_skip_the_same_steps() {
    for (dtype, embedding) in EMBEDDINGS {
        let what = format!("{dtype}, {embedding}");
        let lab = lab(dtype, embedding, 14, &[5, 7, 8, 13]).with(&["train.non_finite=skip"]);
        let mut at_once = trainer_of(&lab, dtype, &[]);
        let mut late = trainer_of(&lab, dtype, &[]);
        let (lines, found, end) = run_to_end(&mut at_once, 0);
        let (late_lines, late_found, late_end) = run_to_end(&mut late, 1);
        assert_eq!(late_lines, lines, "{what}");
        assert_same(&what, &late_end, &end);
        assert_eq!(late.state, at_once.state, "{what}");
        let lines = |found: &[NonFinite]| found.iter().map(|f| (f.step, f.nth, bad_lines(f))).collect::<Vec<_>>();
        assert_eq!(lines(&late_found), lines(&found), "{what}");
        // The last step has none after it.
        assert_eq!(late_found.iter().map(|f| f.steps_since).collect::<Vec<_>>(), [1, 1, 0], "{what}");
    }
}

#[test]
fn overflows_that_the_loss_scale_mends_are_not_counted() {
    let lab = Lab::overflowing().with(&["train.max_steps=9"]);
    let mut trainer = trainer(lab.config(&[]));
    let skipped = (0..9).filter(|_| trainer.step().unwrap().skipped).count();
    assert!(skipped > 1, "{skipped}");
    assert_eq!((trainer.state.non_finite, trainer.take_non_finite()), (0, None));
}

/// `lora_A` is nothing, so that the huge `lora_B` does not show in the loss but in the gradient of the former.
#[test]
fn a_gradient_alone_is_enough_and_no_sample_is_blamed() {
    for dtype in ["fp32", "bf16"] {
        let sets = ["lora.alpha=8000", &format!("model.dtype={dtype}")];
        let lab = Lab::new(Shape::default()).with(&sets).with_init_adapter();
        rewrite(&lab.path("init_adapter").join(WEIGHTS_FILE), |name, tensor| {
            let _ = tensor.shallow_clone().fill_(if name.contains("lora_B") { 1e38 } else { 0.0 });
        });
        let mut trainer = trainer(lab.config(&[]));
        let text = trainer.step().unwrap_err().to_string();
        assert!(text.contains("though each sample's loss is, taken singly"), "{dtype}: {text}");
        let found = trainer.take_non_finite().unwrap();
        assert!(found.loss.is_finite() && !found.grad_norm.is_finite(), "{found:?}");
        assert!(found.samples.len() == 4 && bad_lines(&found).is_empty(), "{found:?}");
    }
}

#[test]
fn a_message_names_three_samples_and_counts_the_rest() {
    let sample = |slot: usize, loss| SampleLoss {
        step: 5,
        place: format!("rows.jsonl:{}", 10 + slot),
        slot,
        tokens: 7,
        label_tokens: 3,
        loss,
    };
    let found = |losses: &[Option<f64>]| NonFinite {
        step: 5,
        loss: f64::NAN,
        grad_norm: f64::INFINITY,
        loss_scale: 1.0,
        is_fp16: false,
        nth: 1,
        allowed: 2,
        steps_since: 0,
        samples: losses.iter().enumerate().map(|(slot, loss)| sample(slot, *loss)).collect(),
    };
    let (bad, good) = (Some(f64::NEG_INFINITY), Some(1.0));
    let three = found(&[bad, good, bad, None, bad]).warning();
    assert!(three.ends_with("so is by itself the loss of rows.jsonl:10, rows.jsonl:12, rows.jsonl:14"), "{three}");
    let five = found(&[bad; 5]).warning();
    assert!(five.ends_with("rows.jsonl:10, rows.jsonl:11, rows.jsonl:12 and 2 more"), "{five}");
    let unknown = found(&[None; 2]).warning();
    assert!(unknown.ends_with("the losses of its samples could not be computed singly"), "{unknown}");
    let lines = found(&[bad, None]).to_json_lines();
    assert!(lines.starts_with("{\"step\":5,\"loss\":\"NaN\",\"grad_norm\":\"inf\","), "{lines}");
    assert!(lines.contains("\"loss\":\"-inf\"}\n") && lines.ends_with("\"loss\":null}\n"), "{lines}");
}

#[test]
fn the_losses_of_a_steps_samples_make_up_its_loss() {
    let lab = Lab::new(Shape::default())
        .with(&["lora.dropout=0.3", "train.micro_batch_tokens=200", "data.shuffle=true"])
        .with_init_adapter();
    let mut trainer = trainer(lab.config(&[]));
    for step in 1..=6 {
        let samples = trainer.next_samples();
        let losses = trainer.sample_losses(step, &samples).unwrap();
        let other_masks = trainer.sample_losses(step + 1, &samples).unwrap();
        let mean = |losses: &[SampleLoss]| {
            let label_tokens: usize = losses.iter().map(|sample| sample.label_tokens).sum();
            losses.iter().map(|s| s.loss.unwrap() * s.label_tokens as f64).sum::<f64>() / label_tokens as f64
        };
        let line = trainer.step().unwrap();
        assert_eq!(line.samples, losses.len() as u64);
        // Sums in another order: rounding of fp32 alone.
        assert!((mean(&losses) - line.loss.unwrap()).abs() < 1e-6, "{} {:?}", mean(&losses), line.loss);
        assert!((mean(&other_masks) - line.loss.unwrap()).abs() > 1e-4, "the masks of another step are others");
    }
}

/// The steps whose samples a run has kept.
fn kept_steps(run_dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(run_dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let step = |name: String| name.strip_prefix("non_finite-step-")?.strip_suffix(".jsonl")?.parse().ok();
    let mut steps: Vec<u64> = names.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn adapter(run_dir: &Path) -> Vec<u8> {
    std::fs::read(run_dir.join("adapter").join(WEIGHTS_FILE)).unwrap()
}

#[test]
fn a_run_that_skips_is_the_same_after_a_resume_and_saves_nothing_that_is_not_finite() {
    /// Dtype, embedding, steps, bad lines, the steps that are counted, the checkpoints that it is resumed from.
    type Case<'a> = (&'a str, f32, usize, &'a [usize], &'a [u64], &'a [u64]);
    // In fp16 it takes sixteen overflows until the loss scale is 1 and mends no more.
    let first_16: Vec<usize> = (0..16).map(|step| 2 * step + 1).collect();
    let in_fp16 = [&first_16[..], &[35, 37]].concat();
    let cases: [Case<'_>; 4] = [
        ("fp32", f32::NAN, 7, &[5, 7, 13], &[3, 4, 7], &[2, 3, 6]),
        ("bf16", f32::NAN, 7, &[5, 7, 13], &[3, 4, 7], &[3]),
        ("bf16", f32::MAX, 7, &[5, 7, 13], &[3, 4, 7], &[4]),
        ("fp16", 100_000.0, 20, &in_fp16, &[18, 19], &[9, 18]),
    ];
    for (dtype, embedding, n_steps, bad, counted, resumed) in cases {
        let what = format!("{dtype}, {embedding}");
        let lab = lab(dtype, embedding, 2 * n_steps, bad).with(&["train.non_finite=skip", "train.max_non_finite=3"]);
        straight_equals_resumed(&what, &lab, n_steps as u64, resumed);
        let run_dir = lab.path("run");
        assert_eq!(kept_steps(&run_dir), counted, "{what}");
        let log = std::fs::read_to_string(run_dir.join("train.log")).unwrap();
        for (nth, step) in (1..).zip(counted) {
            let text = std::fs::read_to_string(run_dir.join(format!("non_finite-step-{step:08}.jsonl"))).unwrap();
            assert_eq!(text.lines().count(), 3, "{what}: {text}");
            let said = format!("warning: step {step} was passed over, {nth} of at most 3: ");
            assert!(log.contains(&said) && log.contains(&format!("rows.jsonl:{}", 2 * step - 1)), "{what}: {log}");
        }
        for (step, line) in (1u64..).zip(metrics(&run_dir)) {
            assert_eq!(line["skipped"], bad.contains(&(2 * step as usize - 1)), "{what}: step {step}");
            let checkpoint = run_dir.join(format!("checkpoints/step-{step:08}"));
            let so_far = counted.iter().filter(|counted| **counted <= step).count();
            assert_eq!(read_json(&checkpoint.join("state.json"))["non_finite"], so_far, "{what}: step {step}");
            for file in [WEIGHTS_FILE, "optimizer.safetensors"] {
                for (name, tensor) in read_tensors(&checkpoint.join(file)) {
                    assert_eq!(tensor.isfinite().all().int64_value(&[]), 1, "{what}: step {step}: {name}");
                }
            }
        }
    }
}

#[test]
fn a_run_that_was_ended_goes_on_once_it_may_skip() {
    let lab = lab("fp32", f32::NAN, 14, &[5, 7, 13]);
    lab.run("train", &[], &["train.non_finite=skip"]).ok();
    let judge = adapter(&lab.path("run"));

    let stopped = lab.path("stopped");
    let output = format!("train.output={}", stopped.display());
    let ran = lab.run("train", &[], &[&output]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let file = stopped.join("non_finite-step-00000003.jsonl");
    assert!(ran.stderr.contains(&format!("the samples of step 3 are in {}", file.display())), "{}", ran.stderr);
    assert!(ran.stderr.contains("error: step 3: loss NaN") && ran.stderr.contains("rows.jsonl:5; "), "{}", ran.stderr);
    assert_eq!(kept_steps(&stopped), [3]);
    assert_eq!(metrics(&stopped).len(), 2);
    assert!(stopped.join("checkpoints/step-00000002").exists() && !stopped.join("checkpoints/step-00000003").exists());

    // Still too few, and the count goes on where it was.
    let resume = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        run(bellora().arg("resume").arg(&stopped).args(sets))
    };
    let ran = resume(&["train.non_finite=skip", "train.max_non_finite=1"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("train.max_non_finite = 1"), "{}", ran.stderr);
    let ran = resume(&["train.max_non_finite=2"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("train.max_non_finite = 2"), "{}", ran.stderr);
    assert_eq!(kept_steps(&stopped), [3, 4, 7]);
    resume(&["train.max_non_finite=3"]).ok();
    assert!(adapter(&stopped) == judge, "the adapters differ");
}

/// The gradient is finite, but its square is not: what the optimizer would keep of it is never saved.
#[test]
fn moments_that_overflow_end_the_run_before_they_are_saved() {
    let sets = ["train.max_grad_norm=0", "train.checkpoint_every=1"];
    let lab = Lab::new(Shape::default()).with(&sets).with_init_adapter();
    rewrite(&lab.path("init_adapter").join(WEIGHTS_FILE), |name, tensor| {
        let _ = tensor.shallow_clone().fill_(if name.contains("lora_B") { 1e25 } else { 0.0 });
    });
    let ran = lab.run("train", &[], &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("exp_avg_sq.") && ran.stderr.contains("not saved"), "{}", ran.stderr);
    let run_dir = lab.path("run");
    assert!(!run_dir.join("checkpoints/step-00000001").exists() && !run_dir.join("adapter").exists());
}
