//! Models that do not fit: every command that would load them says how much it needs and how much there is, beforehand.

use std::path::Path;
use std::process::Command;

use bellora::torch::host_memory;
use serde_json::{Map, Value, json};

use crate::support::{Lab, Ran, Shape, bellora, run};

/// Makes the lab's base one of this shape in fp16 whose weights are zeros that take no room on the disk; gives its bytes.
fn hollow_base(lab: &Lab, hidden: u64, layers: u64) -> u64 {
    let path = lab.path("base/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocab = config["vocab_size"].as_u64().unwrap();
    let (kv, intermediate) = (hidden, 4 * hidden);
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 8),
        ("head_dim", hidden / 8),
    ] {
        config[key] = json!(value);
    }
    std::fs::write(&path, config.to_string()).unwrap();

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
        ("lm_head.weight".to_string(), vec![vocab, hidden]),
    ];
    for layer in 0..layers {
        let mut add =
            |name: &str, shape: &[u64]| tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
        add("self_attn.q_proj", &[hidden, hidden]);
        add("self_attn.k_proj", &[kv, hidden]);
        add("self_attn.v_proj", &[kv, hidden]);
        add("self_attn.o_proj", &[hidden, hidden]);
        add("mlp.gate_proj", &[intermediate, hidden]);
        add("mlp.up_proj", &[intermediate, hidden]);
        add("mlp.down_proj", &[hidden, intermediate]);
    }
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(name, json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = Value::Object(header).to_string();
    let path = lab.path("base/model.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    end
}

#[track_caller]
fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is not in: {}", ran.stderr);
    }
}

fn generate(base: &Path, more: &[&str]) -> Command {
    let mut process = bellora();
    process.arg("generate").arg(base).args(["--prompt", "hello", "--max-new-tokens", "2"]).args(more);
    process
}

#[test]
fn a_model_beyond_this_machine_is_refused_with_both_numbers() {
    let lab = Lab::new(Shape::default()).with(&["data.validation_fraction=0.2", "model.dtype=bf16"]);
    // 100 layers of 24 GB.
    let bytes = hollow_base(&lab, 32768, 100);
    assert!(bytes > 2 << 40);
    for command in ["check", "train", "eval"] {
        let ran = lab.run(command, &[], &[]);
        refused(&ran, &["GiB of memory, and ", "GiB are free on this machine", "hint: "]);
        assert!(!lab.path("run").exists(), "{command} has begun a run");
    }
    refused(
        &run(&mut generate(&lab.path("base"), &[])),
        &["bellora generate: needs ", "GiB are free on this machine", "hint: "],
    );
    let in_fp32 = run(&mut generate(&lab.path("base"), &["--dtype", "fp32"]));
    refused(&in_fp32, &["bellora generate: needs ", "--dtype bf16"]);
}

#[test]
fn ranks_that_share_a_machine_need_its_memory_together() {
    let lab = Lab::new(Shape::default()).with(&["model.dtype=bf16"]);
    // A third of this machine's memory: there is room for one and not for four.
    let bytes = host_memory::room().unwrap().bytes / 3;
    let layers = bytes / hollow_base(&lab, 2048, 1);
    hollow_base(&lab, 2048, layers);
    lab.run("check", &[], &[]).ok();
    let ran = lab.run("train", &["--nproc", "4"], &[]);
    refused(
        &ran,
        &["a step of one sample on each of 4 ranks of this machine with a checkpoint in flight: needs ", "fewer ranks"],
    );
    assert!(!lab.path("run").exists());
}

#[test]
fn a_limit_on_the_address_space_counts() {
    let lab = Lab::new(Shape::default());
    let bytes = hollow_base(&lab, 2048, 4);
    // What a process takes that runs something else: its libraries and threads.
    let taken = {
        let tiny = Lab::new(Shape::default());
        let mut child = generate(&tiny.path("base"), &[]).spawn().unwrap();
        let mut most = 0;
        while child.try_wait().unwrap().is_none() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let field = status.lines().find_map(|line| line.strip_prefix("VmPeak:")?.strip_suffix("kB"));
            most = most.max(field.map_or(0, |kb| kb.trim().parse::<u64>().unwrap()));
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        most << 10
    };
    let within = |limit: u64| {
        let unlimited = generate(&lab.path("base"), &[]);
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -v {}; exec \"$0\" \"$@\"", limit >> 10)]);
        run(limited.arg(unlimited.get_program()).args(unlimited.get_args()))
    };
    // Not even the file can be mapped.
    refused(&within(taken + bytes / 2), &["model.safetensors", "do not fit into the address space", "ulimit -v"]);
    // The file is mapped; then there is room for a third of the weights.
    refused(
        &within(taken + bytes + bytes / 3),
        &["bellora generate: needs ", "left of the limit on address space (ulimit -v)"],
    );
    within(taken + 3 * bytes + (1 << 30)).ok();
}

#[test]
fn a_base_is_computed_in_the_dtype_that_it_is_stored_in() {
    let lab = Lab::new(Shape::default());
    // Large enough that the command says what it takes.
    let bytes = hollow_base(&lab, 2048, 9);
    assert!(bytes > 1 << 30);
    let said = |more: &[&str]| {
        let stderr = run(&mut generate(&lab.path("base"), more)).ok().stderr;
        stderr.split_once(" at the peak").unwrap_or_else(|| panic!("no memory is named: {stderr}")).0.to_owned()
    };
    assert_eq!(said(&[]), said(&["--dtype", "fp16"]));
    assert_ne!(said(&[]), said(&["--dtype", "fp32"]));
    let bad = run(&mut generate(&lab.path("base"), &["--dtype", "fp8"]));
    refused(&bad, &["fp8", "expected fp32, bf16 or fp16"]);
}
