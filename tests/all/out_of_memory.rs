//! A micro-batch that does not fit into memory: the step is done again with smaller ones, and nothing is lost.
//!
//! The limit is the system's on a process's own writable memory (`ulimit -d`), so that the allocator itself fails.

use std::process::Command;

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
    vocab_size: 320,
    head_gain: 1.0,
};

/// Room for the program, the model and some hundreds of tokens, but not for thousands.
const LIMIT_KB: u64 = 480_000;

fn train_within_the_limit(lab: &Lab, sets: &[&str]) -> Ran {
    let unlimited = lab.command("train", &[], sets);
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!("ulimit -d {LIMIT_KB}; exec \"$0\" \"$@\"")]);
    limited.arg(unlimited.get_program()).args(unlimited.get_args()).env("OMP_NUM_THREADS", "1");
    run(&mut limited)
}

#[test]
fn a_micro_batch_that_does_not_fit_is_halved_and_the_step_repeated() {
    let lab = Lab::new(WIDE).with(&["train.global_batch=18", "train.max_steps=3", "lora.dropout=0.1"]);
    let losses = |name: &str| -> Vec<f64> {
        metrics(&lab.path(name)).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let log = |name: &str| std::fs::read_to_string(lab.path(name).join("train.log")).unwrap();
    let output = |name: &str| format!("train.output={}", lab.path(name).display());

    let (small, large) = (output("small"), output("large"));
    train_within_the_limit(&lab, &[&small, "train.micro_batch_tokens=160"]).ok();
    assert!(!log("small").contains("out of memory"), "{}", log("small"));
    train_within_the_limit(&lab, &[&large, "train.micro_batch_tokens=4096"]).ok();
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
    let ran = train_within_the_limit(&lab, &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("step 1: ") && ran.stderr.contains("out of memory with one sample"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint: ") && ran.stderr.contains("recompute"), "{}", ran.stderr);
    let other = format!("train.output={}", lab.path("recomputed").display());
    train_within_the_limit(&lab, &[&other, "train.recompute=all"]).ok();
}
