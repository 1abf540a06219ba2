//! The contract of the program: what each command prints where, what it makes, and its exit code.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::place::{Place, Ran, copy_folder, golden};

/// A place with a finished run of two updates in `run/`.
fn trained() -> Place {
    let place = Place::new();
    place.write_config();
    place.run(&["train", "c.toml"]).ok();
    place
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// An answer is all of standard output, and ends its line.
#[track_caller]
fn answer(ran: Ran) -> String {
    let ran = ran.ok();
    assert_eq!(ran.stderr, "");
    ran.stdout.strip_suffix('\n').unwrap().to_string()
}

#[test]
fn check_tells_everything_and_creates_nothing() {
    let place = Place::new().with(&[("data.validation", "\"rows.jsonl\"")]);
    place.write_config();
    let before = place.tree();
    let ran = place.run(&["check", "c.toml"]).ok();
    assert_eq!(ran.stderr, "");
    for told in [
        "2 layers, hidden 32",
        "10 samples, 1,135 tokens, 173 learned",
        "validation  10 samples",
        "updates     2 of 4 samples (3 an epoch), warmup 1",
        "memory ",
        "### Response:\n\n⟦今天星期三。</s>⟧",
    ] {
        assert!(ran.stdout.contains(told), "{told:?} is not in:\n{}", ran.stdout);
    }
    // Low-rank matrices of 2 layers: q and o are 32 x 32, k and v 8 x 32, rank 6.
    assert!(ran.stdout.contains(&format!("trainable   {} of", "2,496")), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("ready to train\n"), "{}", ran.stdout);
    assert!(place.tree() == before, "files were made or changed");
}

#[test]
fn the_resolved_config_is_printed_with_overrides_and_defaults() {
    let place = Place::new();
    place.write_config();
    let before = place.tree();
    let sets = ["--set", "lora.r=12", "--set", "train.epochs=3", "--set", "data.template=chinese-alpaca"];
    let ran = place.run(&[&["check", "c.toml", "--print-config"][..], &sets].concat()).ok();
    let base = place.path("base").canonicalize().unwrap();
    for line in [
        format!("base = \"{}\"", base.display()),
        "r = 12".into(),
        "epochs = 3".into(),
        "template = \"chinese-alpaca\"".into(),
        "learning_rate = 0.0004  # default".into(),
        "modules_to_save = []  # default".into(),
    ] {
        assert!(ran.stdout.lines().any(|l| l == line), "{line:?} is not in:\n{}", ran.stdout);
    }
    assert!(!ran.stdout.contains("max_steps"), "--set of one of a pair replaces the other:\n{}", ran.stdout);
    assert!(place.tree() == before, "files were made or changed");
    // What is printed is a config itself.
    place.write("printed.toml", &ran.stdout);
    let again = place.run(&["check", "printed.toml", "--print-config"]).ok();
    assert_eq!(again.stdout, ran.stdout.replace("  # default", ""));
}

#[test]
fn prepare_dumps_the_samples_in_file_order_and_keeps_them() {
    let place = Place::new().with(&[("data.max_length", "512"), ("data.truncation", "\"cut\"")]);
    place.write_config();
    let ran = place.run(&["prepare", "c.toml", "--dump", "tokens.jsonl"]).ok();
    assert_eq!(ran.stdout, "");
    assert!(ran.stderr.contains("10 samples, 1135 tokens, 173 learned"), "{}", ran.stderr);
    let read = |path: &Path| -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(read(&place.path("tokens.jsonl")), read(&golden().join("expected/tokens.jsonl")));
    assert_eq!(names(&place.path("cache")).len(), 1);
    assert!(!place.path("run").exists());
    let again = place.run(&["prepare", "c.toml", "--dump", "/dev/stdout"]).ok();
    assert!(again.stderr.contains("from the token cache"), "{}", again.stderr);
    assert_eq!(again.stdout, std::fs::read_to_string(place.path("tokens.jsonl")).unwrap());
}

#[test]
fn a_run_directory_holds_what_was_promised() {
    let place = Place::new().with(&[("train.save_dtype", "\"bf16\""), ("train.checkpoint_every", "1")]);
    place.write_config();
    let ran = place.run(&["train", "c.toml"]).ok();
    assert_eq!(ran.stdout, "", "standard output is data, and training has none");
    let run = place.path("run");
    assert_eq!(
        names(&run),
        ["adapter", "checkpoints", "config.toml", "metrics.jsonl", "run.lock", "tensorboard", "train.log"]
    );
    assert_eq!(names(&run.join("checkpoints")), ["step-00000001", "step-00000002"]);
    let beside = ["template.json", "tokenizer.json", "tokenizer_config.json"];
    let adapter = ["MANIFEST.json", "adapter_config.json", "adapter_model.safetensors"];
    assert_eq!(names(&run.join("adapter")), [&adapter[..], &beside].concat());
    let state = ["optimizer.safetensors", "state.json"];
    assert_eq!(names(&run.join("checkpoints/step-00000002")), [&adapter[..], &state, &beside].concat());

    let config = json_file(&run.join("adapter/adapter_config.json"));
    let base = place.path("base").canonicalize().unwrap();
    let wanted = json!({
        "alpha_pattern": {}, "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": false,
        "inference_mode": true, "init_lora_weights": true, "lora_alpha": 9, "lora_dropout": 0.0,
        "modules_to_save": null, "peft_type": "LORA", "r": 6, "rank_pattern": {}, "revision": null,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM", "use_dora": false,
        "use_rslora": true,
    });
    assert_eq!(config, wanted);
    // The dtype to save is that of trained tables: adapters are fp32 whatever it says.
    let weights = std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    assert_eq!(weights.len(), 2 * 4 * 2);
    assert!(weights.tensors().iter().all(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F32));

    // The same again: refused; to go on: nothing left to do.
    let before = place.tree();
    place.run(&["train", "c.toml"]).refused(&["holds a run already"]);
    for call in [&["train", "c.toml", "--resume"][..], &["resume", "run"]] {
        let ran = place.run(call).ok();
        assert!(ran.stderr.contains("finished already"), "{}", ran.stderr);
    }
    assert!(place.tree() == before, "files were made or changed");
}

#[test]
fn eval_prints_one_line_of_json() {
    let place = trained();
    let of = |target: &str| {
        let ran = place.run(&["eval", target, "--set", "data.validation=rows.jsonl"]).ok();
        assert_eq!(ran.stdout.lines().count(), 1, "{ran:?}");
        let found: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(found["samples"], 10);
        assert_eq!(found["label_tokens"], 173);
        let (loss, perplexity) = (found["eval_loss"].as_f64().unwrap(), found["perplexity"].as_f64().unwrap());
        assert!((loss.exp() - perplexity).abs() < 1e-6 * perplexity, "{found}");
        assert_eq!(found.as_object().unwrap().len(), 4);
        loss
    };
    // Two updates, the first with a rate of 0, change little, but they change it for the better.
    let (start, end) = (of("c.toml"), of("run"));
    assert!(end < start && start - end < 0.1, "{start} {end}");
}

#[test]
fn exports_are_whole_and_ordinary() {
    let place = trained();
    let before = place.tree();
    let export = |from: &str, format: &str, out: &str| {
        let ran = place.run(&["export", from, "--format", format, "--out", out]).ok();
        assert_eq!(ran.stdout, "");
    };
    export("run", "peft", "new/peft");
    let exported = place.path("new/peft");
    assert!(names(&exported).iter().all(|name| !["state.json", "optimizer.safetensors"].contains(&name.as_str())));
    let same = |name: &str| std::fs::read(exported.join(name)).unwrap() == before[&Path::new("run/adapter").join(name)];
    assert!(["adapter_model.safetensors", "template.json", "tokenizer.json"].into_iter().all(same));
    assert_eq!(
        json_file(&exported.join("adapter_config.json")),
        json_file(&place.path("run/adapter/adapter_config.json"))
    );

    place.write("base/generation_config.json", "{\"eos_token_id\": [2, 5]}");
    export("run/adapter", "merged", "merged");
    export("run/checkpoints/step-00000002", "merged", "from-checkpoint");
    let merged = place.path("merged");
    let names = names(&merged);
    for name in ["config.json", "generation_config.json", "model.safetensors", "template.json", "tokenizer.json"] {
        assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
    }
    let mut config = json_file(&merged.join("config.json"));
    assert_eq!(config["vocab_size"], 320);
    config["vocab_size"] = json!(320);
    assert_eq!(config, json_file(&place.path("base/config.json")));
    let read = |path: &str| std::fs::read(place.path(path)).unwrap();
    let (ours, base) = (read("merged/model.safetensors"), read("base/model.safetensors"));
    assert!(ours == read("from-checkpoint/model.safetensors"));
    let (ours, base) = [&ours, &base].map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap()).into();
    for (name, tensor) in base.tensors() {
        let merged = ours.tensor(&name).unwrap();
        assert_eq!((merged.shape(), merged.dtype()), (tensor.shape(), safetensors::Dtype::BF16), "{name}");
        assert_eq!(merged.data() == tensor.data(), !name.contains("self_attn"), "{name}");
    }
    assert_eq!(ours.len(), base.len());
}

#[test]
fn generate_prints_the_answer_alone() {
    let place = trained();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(place.path("tokenizer").join(name), place.path("base").join(name)).unwrap();
    }
    place.run(&["export", "run", "--format", "merged", "--out", "merged"]).ok();
    let generate = |source: &str, more: &[&str]| {
        let call = [&["generate", source, "--prompt", "- 你是谁？", "--max-new-tokens", "12"], more].concat();
        answer(place.run(&call))
    };
    let greedy = generate("run", &[]);
    assert!(!greedy.is_empty());
    assert_eq!(generate("run", &["--temperature", "0", "--seed", "7"]), greedy);
    assert_eq!(generate("run/adapter", &[]), greedy);
    // The template of the run travels with what it is merged into; the base has none of its own.
    let other = Place::new().with(&[("data.template", "\"chinese-alpaca\"")]);
    other.write_config();
    other.run(&["train", "c.toml"]).ok();
    other.run(&["export", "run", "--format", "merged", "--out", "merged"]).ok();
    let ask = ["generate", "merged", "--prompt", "你是谁？", "--max-new-tokens", "12"];
    let ours = answer(other.run(&ask));
    let text = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\
                \n\n### Instruction:\n你是谁？\n\n### Response: ";
    let raw = ["generate", "merged", "--raw", "--prompt", text, "--max-new-tokens", "12"];
    assert_eq!(answer(other.run(&raw)), ours);

    // Draws depend on the seed alone.
    let drawn = |seed| generate("run", &["--temperature", "1.5", "--top-p", "0.95", "--top-k", "300", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    // One candidate leaves nothing to draw, however hot.
    assert_eq!(generate("run", &["--temperature", "9", "--top-k", "1", "--seed", "3"]), greedy);
    // Without a template the base continues the text.
    assert_ne!(generate("base", &["--raw"]), generate("base", &[]));
}

#[test]
fn a_stop_id_of_the_base_ends_an_answer() {
    let place = Place::new();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(place.path("tokenizer").join(name), place.path("base").join(name)).unwrap();
    }
    let ask = ["generate", "base", "--prompt", "x", "--max-new-tokens", "5"];
    let text = answer(place.run(&ask));
    assert!(!text.is_empty());
    let every_id: Vec<u32> = (0..320).collect();
    place.write("base/generation_config.json", json!({ "eos_token_id": every_id }).to_string());
    assert_eq!(answer(place.run(&ask)), "");
}

#[test]
fn what_a_run_was_made_from_may_move() {
    let place = trained();
    let ask =
        |more: &[&str]| place.run(&[&["generate", "run", "--prompt", "x", "--max-new-tokens", "4"][..], more].concat());
    let text = answer(ask(&[]));
    place.rename("rows.jsonl", "moved.jsonl");
    assert_eq!(answer(ask(&[])), text);
    place.rename("base", "elsewhere");
    ask(&[]).refused(&["base", "is not there", "--base DIR"]);
    assert_eq!(answer(ask(&["--base", "elsewhere"])), text);
    place.run(&["export", "run", "--format", "merged", "--out", "merged"]).refused(&["--base DIR"]);
    place.run(&["export", "run", "--format", "merged", "--out", "merged", "--base", "elsewhere"]).ok();
    // An adapter may name its base by a path from its own folder.
    place.run(&["export", "run", "--format", "peft", "--out", "kit/adapter", "--base", "elsewhere"]).ok();
    copy_folder(&place.path("elsewhere"), &place.path("kit/base"));
    place.remove("kit/adapter/MANIFEST.json");
    place.edit_json("kit/adapter/adapter_config.json", &json!({"base_model_name_or_path": "../base"}));
    let call = ["generate", "kit/adapter", "--prompt", "x", "--max-new-tokens", "4"];
    assert_eq!(answer(place.run(&call)), text);
}

#[test]
fn an_adapter_that_was_tampered_with_is_named() {
    let place = trained();
    let ask = || place.run(&["generate", "run", "--prompt", "x", "--max-new-tokens", "4"]);
    place.write("run/adapter/README.md", "A file that nobody reads changes nothing.");
    answer(ask());
    place.run(&["resume", "run"]).ok();
    let name = "run/adapter/adapter_model.safetensors";
    let mut bytes = std::fs::read(place.path(name)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    place.write(name, bytes);
    ask().refused(&[name, "damaged", "MANIFEST.json"]);
    place.run(&["resume", "run"]).refused(&[name, "damaged", "MANIFEST.json"]);
}

#[test]
fn streams_that_are_gone_do_no_harm() {
    let place = trained();
    // Nobody reads the answer.
    let mut child = place
        .bellora(&["check", "c.toml", "--set", "train.output=other"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(stderr, "error: standard output: was closed by its reader\n");
    // Nobody reads the log: the training goes on.
    let mut child = place
        .bellora(&["train", "c.toml", "--set", "train.output=unheard"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(place.path("unheard/adapter/adapter_model.safetensors").is_file());
}

#[test]
fn usage_errors_are_exit_code_2() {
    let place = Place::new();
    place.write_config();
    let before = place.tree();
    for call in [
        &[][..],
        &["chat"],
        &["bench"],
        &["bench", "c.toml", "--vocab-size", "512"],
        &["train"],
        &["train", "c.toml", "--nproc", "two"],
        &["export", "adapter", "--format", "gguf", "--out", "out"],
        &["generate", "base"],
        &["check", "c.toml", "--set"],
    ] {
        let ran = place.run(call);
        assert_eq!(ran.code, Some(2), "{call:?}: {ran:?}");
        assert!(!ran.stderr.is_empty() && !ran.stderr.contains("panicked"), "{call:?}: {ran:?}");
    }
    for call in ["--version", "--help"] {
        assert!(!place.run(&[call]).ok().stdout.is_empty());
    }
    assert!(place.tree() == before, "files were made or changed");
}
