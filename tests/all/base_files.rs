//! Keys of a base's JSON files: each is honoured, known to have no effect, refused, or named.

use serde_json::{Map, Value, json};

use crate::support::{Lab, Ran, Shape, bellora, run};

/// A lab whose base has another `config.json`: `changes` are put over it, `null` takes a key out.
fn lab_with(changes: &Value) -> Lab {
    let lab = Lab::new(Shape::default());
    change(&lab, "base/config.json", changes);
    lab
}

fn change(lab: &Lab, name: &str, changes: &Value) {
    let path = lab.path(name);
    let mut file: Map<String, Value> =
        std::fs::read(&path).map_or_else(|_| Map::new(), |bytes| serde_json::from_slice(&bytes).unwrap());
    for (key, value) in changes.as_object().unwrap() {
        file.insert(key.clone(), value.clone());
    }
    std::fs::write(path, serde_json::to_vec(&file).unwrap()).unwrap();
}

fn check(changes: Value) -> Ran {
    lab_with(&changes).run("check", &[], &[])
}

/// What `check` warns of.
fn warnings(ran: &Ran) -> Vec<&str> {
    ran.stdout.lines().filter_map(|line| line.strip_prefix("warning: ")).collect()
}

#[track_caller]
fn assert_taken(changes: Value, warned_of: &[&str]) {
    let ran = check(changes.clone()).ok();
    let warnings = warnings(&ran);
    assert_eq!(warnings.len(), warned_of.len(), "{changes}: {warnings:?}");
    for (warning, words) in warnings.iter().zip(warned_of) {
        assert!(warning.contains("base/config.json: ") && warning.contains(words), "{changes}: {warning}");
    }
}

#[track_caller]
fn assert_refused(changes: Value, words: &[&str]) {
    let ran = check(changes.clone());
    assert_eq!(ran.code, Some(2), "{changes}: {}{}", ran.stdout, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{changes}: {word:?} is not in: {}", ran.stderr);
    }
    assert!(ran.stderr.contains("base/config.json: ") && ran.stderr.contains("hint: "), "{changes}: {}", ran.stderr);
}

#[test]
fn unknown_keys_that_say_nothing_pass_and_others_are_named() {
    let nothing = json!({
        "a": null, "b": false, "c": 0, "d": 1.0, "e": "", "f": [], "g": {}, "h": { "i": [], "j": 0 }, "pretraining_tp": 2,
        "transformers_version": "4.31.0", "_name_or_path": "somewhere", "use_cache": true, "temperature": 0.7,
    });
    assert_taken(nothing, &[]);
    assert_taken(
        json!({ "norm_kind": "layer" }),
        &["norm_kind: is not known here and is passed over; it says \"layer\""],
    );
    assert_taken(json!({ "use_qk_norm": true }), &["use_qk_norm"]);
    assert_taken(json!({ "kinds": { "norm": "layer" }, "names": ["a"] }), &["kinds", "names"]);
    assert_taken(json!({ "architectures": ["OwnForCausalLM"] }), &["architectures: names [\"OwnForCausalLM\"]"]);
    // As the first Llama's files spell it.
    assert_taken(json!({ "architectures": ["LLaMAForCausalLM"] }), &[]);
}

#[test]
fn an_unknown_number_is_a_fault_unless_it_is_allowed() {
    assert_refused(
        json!({ "logit_scale": 0.0625 }),
        &["logit_scale: is 0.0625", "model.allow_config_keys = [\"logit_scale\"]"],
    );
    assert_refused(json!({ "residual_multiplier": -1, "other": 3 }), &["residual_multiplier", "other: is 3"]);
    assert_refused(json!({ "mup": { "width": 2 } }), &["mup: is {\"width\":2}"]);
    assert_refused(json!({ "skipped_layers": [0] }), &["skipped_layers: is [0]"]);
    let lab = lab_with(&json!({ "logit_scale": 0.0625 }));
    let allowed = lab.run("train", &[], &["model.allow_config_keys=logit_scale", "train.max_steps=1"]).ok();
    assert!(allowed.stderr.contains("warning: ") && allowed.stderr.contains("logit_scale"), "{}", allowed.stderr);
    // The run keeps it, so that what comes after needs no word; the adapter by itself does.
    let generate = |source: &str, more: &[&str]| {
        let arguments = ["--prompt", "q", "--max-new-tokens", "1"];
        run(bellora().arg("generate").arg(lab.path(source)).args(arguments).args(more))
    };
    generate("run", &[]).ok();
    let refused = generate("run/adapter", &[]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    let passed_over = generate("run/adapter", &["--allow-config-key", "logit_scale"]).ok();
    assert!(passed_over.stderr.contains("warning: "), "{}", passed_over.stderr);
}

#[test]
fn dropout_of_attention_weights_is_refused_in_training_alone() {
    assert_refused(json!({ "attention_dropout": 0.1 }), &["attention_dropout: is 0.1", "allow_config_keys"]);
    assert_refused(json!({ "attention_dropout": "0.1" }), &["attention_dropout: expected a share"]);
    let lab = lab_with(&json!({ "attention_dropout": 0.5 }));
    let allow = "model.allow_config_keys=attention_dropout";
    let allowed = lab.run("check", &[], &[allow]).ok();
    assert!(warnings(&allowed)[0].contains("attention_dropout: is 0.5"), "{}", allowed.stdout);
    run(bellora().arg("generate").arg(lab.path("base")).args(["--prompt", "q", "--max-new-tokens", "1"])).ok();
}

#[test]
fn rotary_settings_are_taken_whole_or_refused() {
    let scaling = |settings: Value| json!({ "rope_scaling": settings });
    for other in ["linear", "yarn", "su", "longrope", "ntk"] {
        let settings = scaling(json!({ "type": other, "factor": 2.0 }));
        assert_refused(settings.clone(), &[other, "choose another base"]);
        assert!(!check(settings).stderr.contains("remove"), "{other}: without the entry it is another model");
    }
    let dynamic = scaling(json!({ "rope_type": "dynamic", "factor": 2.0 }));
    assert_refused(dynamic, &["dynamic", "up to max_position_embeddings", "remove the entry"]);
    assert_taken(scaling(json!({ "type": "linear", "factor": 1.0 })), &[]);
    assert_refused(scaling(json!({ "type": "linear", "rope_type": "default" })), &["which one is meant?"]);
    assert_refused(scaling(json!({ "rope_type": "default", "factor": 4.0 })), &["rope_scaling.factor: is 4.0"]);
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let mut more = llama3.clone();
    more["attention_factor"] = json!(0.5);
    assert_refused(scaling(more), &["rope_scaling.attention_factor: is 0.5"]);
    let both = json!({ "rope_scaling": llama3, "rope_parameters": { "rope_type": "default" } });
    assert_taken(both, &["rope_scaling: says {\"rope_type\":\"llama3\""]);
}

#[test]
fn values_of_another_kind_are_refused() {
    assert_refused(json!({ "eos_token_id": "2" }), &["eos_token_id: expected a token's number"]);
    assert_refused(json!({ "eos_token_id": [2, 2.5] }), &["eos_token_id"]);
    assert_refused(json!({ "hidden_act": 3 }), &["hidden_act", "3"]);
    assert_refused(json!({ "layer_types": ["full_attention", "sliding_attention"] }), &["layer_types"]);
    assert_refused(json!({ "rope_interleaved": true }), &["rope_interleaved"]);
    assert_refused(json!({ "model_type": "qwen3_moe" }), &["\"qwen3_moe\"", "a choice of experts"]);
    assert_refused(json!({ "model_type": "made-up" }), &["\"made-up\""]);
    assert_taken(json!({ "eos_token_id": [2, -1], "hidden_act": "swish", "quantization_config": {} }), &[]);
}

#[test]
fn generation_config_is_read_as_strictly() {
    let lab = lab_with(&json!({}));
    change(&lab, "base/generation_config.json", &json!({ "eos_token_id": [2, 7], "temperature": 0.6, "novelty": "x" }));
    let ran = lab.run("check", &[], &[]).ok();
    assert!(matches!(warnings(&ran)[..], [one] if one.contains("generation_config.json: novelty: ")), "{}", ran.stdout);
    change(&lab, "base/generation_config.json", &json!({ "eos_token_id": "</s>" }));
    let ran = lab.run("check", &[], &[]);
    assert!(ran.code == Some(2) && ran.stderr.contains("generation_config.json: eos_token_id"), "{}", ran.stderr);
    std::fs::write(lab.path("base/generation_config.json"), "{\"eos").unwrap();
    let ran = lab.run("check", &[], &[]);
    assert!(
        ran.code == Some(2) && ran.stderr.contains("generation_config.json: is not a JSON object"),
        "{}",
        ran.stderr
    );
}

#[test]
fn where_base_and_tokenizer_name_other_ends_check_says_so() {
    assert_taken(json!({ "eos_token_id": 7 }), &["eos_token_id: ends a text with token 7 ("]);
    assert_taken(json!({ "eos_token_id": [7, 2] }), &[]);
    assert_taken(json!({ "eos_token_id": null }), &[]);
    // The lab's tokenizer puts nothing before a text.
    assert_taken(json!({ "bos_token_id": 9 }), &[]);
}

#[test]
fn a_merged_model_stops_at_the_end_that_was_trained() {
    let ends_of = |base: Value, generation: Option<Value>| {
        let lab = lab_with(&json!({ "eos_token_id": base }));
        if let Some(generation) = &generation {
            change(&lab, "base/generation_config.json", &json!({ "eos_token_id": generation, "top_k": 3 }));
        }
        lab.run("train", &[], &["train.max_steps=1"]).ok();
        run(bellora().arg("export").arg(lab.path("run")).args(["--format", "merged", "--out"]).arg(lab.path("merged")))
            .ok();
        let read = |name: &str| -> Option<Value> {
            std::fs::read(lab.path("merged").join(name)).ok().map(|bytes| serde_json::from_slice(&bytes).unwrap())
        };
        let (config, generation) = (read("config.json").unwrap(), read("generation_config.json"));
        assert!(generation.as_ref().is_none_or(|generation| generation["top_k"] == 3));
        (config["eos_token_id"].clone(), generation.map(|generation| generation["eos_token_id"].clone()))
    };
    // The lab's tokenizer ends a text with token 2.
    assert_eq!(ends_of(json!(2), None), (json!(2), None));
    assert_eq!(ends_of(json!(7), Some(json!([9, 7]))), (json!([2, 7]), Some(json!([2, 9, 7]))));
    assert_eq!(ends_of(json!([7, 2]), Some(json!(2))), (json!([2, 7]), Some(json!(2))));
    assert_eq!(ends_of(json!(null), Some(json!(null))), (json!(2), Some(json!(2))));
}

#[test]
fn damaged_files_are_named_as_what_they_are() {
    let lab = lab_with(&json!({}));
    let text = std::fs::read_to_string(lab.path("base/config.json")).unwrap();
    for (file, bytes, words) in [
        ("config.json", format!("\u{feff}{text}").into_bytes(), "byte-order mark"),
        ("config.json", text.replace("24,", "NaN,").into_bytes(), "NaN"),
        ("config.json", text.encode_utf16().flat_map(u16::to_le_bytes).collect(), "UTF-16"),
        ("config.json", text.replacen('{', "{\"rope_theta\": 5.0, ", 1).into_bytes(), "a key twice: `rope_theta`"),
        ("tokenizer_config.json", b"{\"legacy\": true, \"legacy\": false}".to_vec(), "a key twice: `legacy`"),
    ] {
        let path = lab.path("base").join(file);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let ran = lab.run("check", &[], &[]);
        std::fs::write(&path, whole).unwrap();
        assert_eq!(ran.code, Some(2), "{words}: {}", ran.stderr);
        assert!(ran.stderr.contains(words) && ran.stderr.contains(file), "{words}: {}", ran.stderr);
    }
}

#[test]
fn a_window_is_taken_where_no_text_is_longer() {
    let mistral = |more: Value| {
        let mut changes = json!({ "model_type": "mistral", "max_position_embeddings": 4096 });
        changes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        changes
    };
    assert_taken(mistral(json!({ "sliding_window": null })), &[]);
    assert_taken(mistral(json!({})), &[]);
    assert_taken(mistral(json!({ "sliding_window": 160 })), &[]);
    assert_refused(mistral(json!({ "sliding_window": 159 })), &["sliding_window: is 159", "160 tokens"]);
    assert_refused(mistral(json!({ "sliding_window": "512" })), &["sliding_window", "positive integer"]);
    assert_refused(mistral(json!({ "num_key_value_heads": null })), &["num_key_value_heads: missing"]);
}

#[test]
fn layers_with_a_window_are_those_that_have_it_in_use() {
    let check = |changes: Value| {
        let lab = Lab::new(Shape { model_type: "qwen2", ..Shape::default() });
        change(&lab, "base/config.json", &changes);
        lab.run("check", &[], &[])
    };
    let sliding = json!(["full_attention", "sliding_attention"]);
    for taken in [
        json!({ "use_sliding_window": false, "sliding_window": 16, "max_window_layers": 1 }),
        json!({ "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 2 }),
        json!({ "use_sliding_window": true, "sliding_window": 16, "layer_types": ["full_attention", "full_attention"] }),
        json!({ "use_sliding_window": true, "sliding_window": 160, "layer_types": sliding }),
        json!({ "use_sliding_window": true, "sliding_window": null, "max_window_layers": 1 }),
    ] {
        let ran = check(taken.clone());
        assert!(ran.code == Some(0) && warnings(&ran).is_empty(), "{taken}: {}{}", ran.stdout, ran.stderr);
    }
    for refused in [
        json!({ "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1 }),
        json!({ "use_sliding_window": true, "sliding_window": 16, "layer_types": sliding }),
    ] {
        let ran = check(refused.clone());
        assert!(ran.code == Some(2) && ran.stderr.contains("sliding_window: is 16"), "{refused}: {}", ran.stderr);
    }
    let ran = check(json!({ "use_sliding_window": false, "layer_types": sliding }));
    assert!(ran.code == Some(2) && ran.stderr.contains("layer_types: layers of other kinds"), "{}", ran.stderr);
}
