//! A micro-batch that does not fit into memory: the step is done again with smaller ones, and nothing is lost.
//!
//! The limit is the system's on a process's own writable memory (`ulimit -d`), so that the allocator itself fails. How much
//! a process takes depends on the CPU, for which oneDNN writes its code: so each limit lies between what two runs without
//! one took on this machine.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::resume::ended;
use crate::support::{Lab, Ran, Shape, metrics, rows, run};

/// Wide MLPs: a token keeps 130 kB in fp32, and its gradients need half as much again.
const WIDE: Shape = Shape {
    hidden: 64,
    intermediate: 4096,
    layers: 4,
    heads: 4,
    kv_heads: 4,
    head_dim: 16,
    is_tied: false,
    llama3_rope: false,
    model_type: "llama",
    has_biases: false,
    vocab_size: 320,
    head_gain: 1.0,
};

fn train_within(limit_kb: u64, lab: &Lab, sets: &[&str]) -> Ran {
    let unlimited = lab.command("train", &[], sets);
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!("ulimit -d {limit_kb}; exec \"$0\" \"$@\"")]);
    limited.arg(unlimited.get_program()).args(unlimited.get_args());
    run(limited.envs(unlimited.get_envs().filter_map(|(name, value)| Some((name, value?)))))
}

/// Trains without a limit, and gives the most memory of its own that the process was seen to have, in KB.
fn taken_kb(lab: &Lab, sets: &[&str]) -> u64 {
    let mut child = lab.command("train", &[], sets).stderr(Stdio::piped()).spawn().unwrap();
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        most = most.max(data_kb(&child));
        std::thread::sleep(Duration::from_millis(1));
    }
    ended(child).ok();
    most
}

/// What the limit of `ulimit -d` counts.
fn data_kb(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("VmData:")?.strip_suffix("kB"));
    field.map_or(0, |kb| kb.trim().parse().unwrap())
}

#[test]
fn a_micro_batch_that_does_not_fit_is_halved_and_the_step_repeated() {
    let lab = Lab::new(WIDE).with(&["train.global_batch=18", "train.max_steps=3", "lora.dropout=0.1"]);
    let losses = |name: &str| -> Vec<f64> {
        metrics(&lab.path(name)).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let log = |name: &str| std::fs::read_to_string(lab.path(name).join("train.log")).unwrap();
    let output = |name: &str| format!("train.output={}", lab.path(name).display());

    let whole = taken_kb(&lab, &[&output("whole"), "train.micro_batch_tokens=4096"]);
    let alone = taken_kb(&lab, &[&output("alone"), "train.micro_batch_tokens=160"]);
    // All 18 samples at once do not fit, a quarter of them does.
    let limit = alone + (whole - alone) * 6 / 10;
    println!("one sample at a time took {alone} KB, all {whole}; the limit is {limit}");
    let (small, large) = (output("small"), output("large"));
    train_within(limit, &lab, &[&small, "train.micro_batch_tokens=160"]).ok();
    assert!(!log("small").contains("out of memory"), "{}", log("small"));
    train_within(limit, &lab, &[&large, "train.micro_batch_tokens=4096"]).ok();
    // Half may still be too much, depending on how the system lays memory out.
    let n_halved = log("large").matches("out of memory in step ").count();
    assert!((1..=2).contains(&n_halved), "{}", log("large"));
    // The same updates to rounding: nothing of the attempt that failed is left in the gradients.
    for (ours, judge) in losses("large").iter().zip(losses("small")) {
        assert!((ours - judge).abs() <= 2e-6, "{:?}, {:?}", losses("large"), losses("small"));
    }
    assert_eq!(losses("large").len(), 3);
    let kept = std::fs::read_to_string(lab.path("large/config.toml")).unwrap();
    assert!(!kept.contains("micro_batch_tokens = 4096"), "what fitted is kept for a resume: {kept}");
}

#[test]
fn a_sample_that_does_not_fit_alone_is_an_error_that_says_what_helps() {
    let lab = Lab::new(WIDE).with(&["data.max_length=4096", "train.global_batch=1", "train.max_steps=1"]);
    let (instruction, output) = &rows(1, 3)[0];
    lab.write_rows("rows.jsonl", &[(instruction.clone(), output.repeat(60))]);
    let output = |name: &str| format!("train.output={}", lab.path(name).display());
    let kept = taken_kb(&lab, &[&output("kept")]);
    let made_again = taken_kb(&lab, &[&output("made_again"), "train.recompute=all"]);
    let limit = (kept + made_again) / 2;
    println!("the sample took {kept} KB, recomputed {made_again}; the limit is {limit}");
    let ran = train_within(limit, &lab, &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("step 1: ") && ran.stderr.contains("out of memory with one sample"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint: ") && ran.stderr.contains("recompute"), "{}", ran.stderr);
    train_within(limit, &lab, &[&output("recomputed"), "train.recompute=all"]).ok();
}
