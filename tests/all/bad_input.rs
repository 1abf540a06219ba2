//! Bad input of every kind: the exit code, the culprit's name, a hint, no panic, and nothing left behind.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value, json};

use crate::place::{Place, Ran, tensor};

/// One way to go wrong.
struct Kind {
    name: &'static str,
    spoil: Box<dyn Fn(Place) -> Place + Sync>,
    /// What is called; `check c.toml` of most.
    call: Vec<&'static str>,
    /// What the message names: the file or key, and what is wrong with it.
    named: Vec<&'static str>,
    /// A part of the hint.
    hint: &'static str,
}

fn kind(
    name: &'static str,
    spoil: impl Fn(Place) -> Place + Sync + 'static,
    named: &[&'static str],
    hint: &'static str,
) -> Kind {
    Kind { name, spoil: Box::new(spoil), call: vec!["check", "c.toml"], named: named.to_vec(), hint }
}

/// A key of the config with a value it cannot have.
fn value(key: &'static str, value: &'static str, named: &[&'static str], hint: &'static str) -> Kind {
    let named: Vec<_> = [key].iter().chain(named).copied().collect();
    kind(value, move |place| place.with(&[(key, value)]), &named, hint)
}

/// A config file that is none, named as the program is called with it.
fn config_file(name: &'static str, contents: &'static [u8], named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.write(name, contents);
        place
    };
    Kind { call: vec!["check", name], ..kind(name, spoil, named, hint) }
}

/// A file in place of another.
fn file(name: &'static str, contents: &'static [u8], named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.write(name, contents);
        place
    };
    kind(name, spoil, named, hint)
}

fn base_config(changes: Value, named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.edit_json("base/config.json", &changes);
        place
    };
    kind("config.json", spoil, named, hint)
}

fn base_tensors(
    change: impl Fn(&mut Map<String, Value>, &mut Vec<u8>) + Sync + 'static,
    named: &[&'static str],
    hint: &'static str,
) -> Kind {
    let spoil = move |place: Place| {
        place.edit_tensors("base/model.safetensors", &change);
        place
    };
    kind("model.safetensors", spoil, named, hint)
}

/// A base folder without its weights, but with a file of another kind.
fn instead_of_weights(name: &'static str, named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.remove("base/model.safetensors");
        place.write(&format!("base/{name}"), "x");
        place
    };
    kind(name, spoil, named, hint)
}

fn init_adapter(changes: Value, named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.edit_json("adapter/adapter_config.json", &changes);
        place.with(&[("model.init_adapter", "\"adapter\"")])
    };
    kind("adapter_config.json", spoil, named, hint)
}

fn tokenizer(change: impl Fn(&mut Value) + Sync + 'static, named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        let bytes = std::fs::read(place.path("tokenizer/tokenizer.json")).unwrap();
        let mut json = serde_json::from_slice(&bytes).unwrap();
        change(&mut json);
        place.write("tokenizer/tokenizer.json", json.to_string());
        place
    };
    kind("tokenizer.json", spoil, named, hint)
}

fn rows(name: &'static str, contents: &'static [u8], named: &[&'static str], hint: &'static str) -> Kind {
    let spoil = move |place: Place| {
        place.write(name, contents);
        place.with(&[("data.train", &format!("\"{name}\""))])
    };
    kind(name, spoil, named, hint)
}

fn call(call: &[&'static str], named: &[&'static str], hint: &'static str) -> Kind {
    Kind { call: call.to_vec(), ..kind("call", |place| place, named, hint) }
}

/// Runs all kinds, several at once, and tells of all that are not as they should be.
#[track_caller]
fn assert_all_refused(kinds: &[Kind]) {
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(kind) = kinds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let place = (kind.spoil)(Place::new());
                    place.write_config();
                    let before = place.tree();
                    let ran = place.run(&kind.call);
                    let mut faults = shortcomings(kind, &ran);
                    if place.tree() != before {
                        faults.push("files were made or changed".to_string());
                    }
                    if !faults.is_empty() {
                        let told = format!("{} {:?}: {}\n{ran:?}", kind.name, kind.call, faults.join("; "));
                        wrong.lock().unwrap().push(told);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} kinds:\n{}", wrong.len(), kinds.len(), wrong.join("\n\n"));
}

fn shortcomings(kind: &Kind, ran: &Ran) -> Vec<String> {
    let mut faults = Vec::new();
    if ran.code != Some(2) {
        faults.push(format!("exit code {:?}", ran.code));
    }
    if !ran.stderr.starts_with("error: ") || !ran.stdout.is_empty() {
        faults.push("the message is not all there is".to_string());
    }
    for named in &kind.named {
        if !ran.stderr.contains(named) {
            faults.push(format!("{named:?} is not named"));
        }
    }
    if !ran.stderr.lines().any(|line| line.trim_start().starts_with("hint: ") && line.contains(kind.hint)) {
        faults.push(format!("no hint says {:?}", kind.hint));
    }
    for word in ["panicked", "defect", "RUST_BACKTRACE", "Option::unwrap", "Result::unwrap", "frame #"] {
        if ran.stderr.contains(word) {
            faults.push(format!("{word:?} is said"));
        }
    }
    faults
}

#[test]
fn config_files_and_values() {
    assert_all_refused(&[
        config_file("c.yaml", b"model_name_or_path: x\nlora_r: 8\n", &["c.yaml", "YAML"], "[data]"),
        config_file("axolotl", b"base_model: meta-llama/x\nload_in_8bit: true\n", &["axolotl", "YAML"], "[data]"),
        config_file("c.json", b"{\"model\": {}}", &["c.json", "JSON"], "[data]"),
        config_file("args.sh", b"#!/bin/sh\npython train.py --lr 1e-4\n", &["args.sh", "shell"], "[data]"),
        config_file("utf16.toml", b"\xff\xfe[\0m\0", &["utf16.toml", "UTF-8"], "UTF-8"),
        config_file("torn.toml", b"[model]\nbase = \"ba", &["torn.toml:2", "TOML"], "quotes"),
        config_file("twice.toml", b"[lora]\nr = 4\nr = 5\n", &["twice.toml:3", "duplicate"], "once"),
        config_file("empty.toml", b"", &["model.base", "data.train", "train.output"], "under [train]"),
        call(&["check", "nowhere.toml"], &["nowhere.toml", "cannot be read"], "path of a TOML file"),
        call(&["check", "base"], &["base", "cannot be read"], "folder"),
        value("lora.r", "0", &["c.toml:", "at least 1", "found 0"], "default, 64"),
        value("lora.r", "\"64\"", &["found the text"], "without quotes"),
        value("lora.r", "1000000000000", &["at most 65536"], "default, 64"),
        value("lora.dropout", "1.0", &["less than 1"], "default, 0.05"),
        value("lora.alpha", "nan", &["greater than 0", "found NaN"], "default, 128"),
        value("train.learning_rate", "-1e-4", &["greater than 0"], "default, 0.0004"),
        value("train.betas", "[0.9]", &["two numbers"], "default, [0.9, 0.999]"),
        value("data.max_length", "100000000000", &["at most 1048576"], "default, 512"),
        value("train.micro_batch_tokens", "10", &["data.max_length = 256", "found 10"], "\"auto\""),
        value("train.epochs", "1", &["both are given"], "keep one"),
        value("model.resize_vocab", "true", &["lora.modules_to_save"], "[\"embed_tokens\", \"lm_head\"]"),
        value("data.template", "\"llama3\"", &["alpaca"], "template file"),
        value("data.validation_fraction", "1", &["less than 1"], "default, 0.0"),
        value("train.output", "\"rows.jsonl/run\"", &["is a file"], "another place"),
        value("data.cache_dir", "\"rows.jsonl\"", &["is a file"], "another place"),
        value("data.train", "[]", &["at least one file"], "path"),
        value("data.validation", "\"nowhere.jsonl\"", &["no file"], "working folder"),
        call(&["check", "c.toml", "--set", "lora.r=many"], &["--set lora.r=many", "whole number"], "default, 64"),
        call(&["check", "c.toml", "--set", "lora.rank=4"], &["--set lora.rank=4", "unknown"], "lora.r"),
        call(&["check", "c.toml", "--set", "seed"], &["--set seed"], "train.learning_rate=1e-4"),
    ]);
}

#[test]
fn keys_and_files_of_other_trainers() {
    let key = |key, named: &[&'static str], hint| value(key, "4", named, hint);
    let words = |of, word, hint| value(of, word, &["expected"], hint);
    assert_all_refused(&[
        key("data.cutoff_len", &["unknown key"], "data.max_length"),
        key("data.sequence_len", &["unknown key"], "data.max_length"),
        key("data.preprocessing_num_workers", &["unknown key"], "leave it out"),
        key("train.per_device_train_batch_size", &["unknown key"], "train.global_batch"),
        key("train.gradient_accumulation_steps", &["unknown key"], "train.global_batch"),
        key("train.num_train_epochs", &["unknown key"], "train.epochs"),
        key("train.lr", &["unknown key"], "train.learning_rate"),
        key("train.save_steps", &["unknown key"], "train.checkpoint_every"),
        key("train.deepspeed", &["unknown key"], "use train.shard"),
        key("lora.lora_alpha", &["unknown key"], "lora.alpha"),
        key("lora.lora_target", &["unknown key"], "lora.target_modules"),
        key("model.model_name_or_path", &["unknown key"], "model.base"),
        key("model.load_in_4bit", &["unknown key"], "quantised bases are not supported"),
        key("model.init_adaptor", &["unknown key"], "did you mean model.init_adapter?"),
        words("model.dtype", "\"bfloat16\"", "\"bf16\""),
        words("lora.target_modules", "\"all-linear\"", "all seven projections"),
        words("lora.target_modules", "[\"c_attn\"]", "\"q_proj\", \"k_proj\", \"v_proj\""),
        words("train.schedule", "\"cosine_with_restarts\"", "\"cosine\""),
        config_file("t.toml", b"[training]\nlr = 1e-4\n", &["[training]", "unknown section"], "[train]"),
        value("model.base", "\"meta-llama/Llama-2-7b-hf\"", &["no folder"], "hf download meta-llama/Llama-2-7b-hf"),
        value("data.train", "\"BelleGroup/train_0.5M_CN\"", &["no file"], "not downloaded"),
        instead_of_weights("pytorch_model.bin", &["base", "pickle"], "safe_serialization=True"),
        instead_of_weights("pytorch_model-00001-of-00002.bin", &["base", "pickle"], "save_pretrained"),
        instead_of_weights("model-q4_k.gguf", &["base", "GGUF"], "original safetensors"),
        instead_of_weights("consolidated.00.pth", &["base", "Meta"], "Hugging Face form"),
        instead_of_weights("tf_model.h5", &["base", "TensorFlow"], "safetensors"),
        instead_of_weights("model-00001-of-00002.safetensors", &["base", "index.json"], "need their index"),
        value("model.base", "\"adapter\"", &["adapter", "not a base"], "model.init_adapter"),
        kind(
            "gguf file as base",
            |place| {
                place.write("model.gguf", "GGUF");
                place.with(&[("model.base", "\"model.gguf\"")])
            },
            &["model.base", "is a file"],
            "GGUF files are not read",
        ),
        kind(
            "folder of the hub's cache",
            |place| {
                place.write("models--a--b/snapshots/0123/config.json", "{}");
                place.with(&[("model.base", "\"models--a--b\"")])
            },
            &["models--a--b", "cache"],
            "snapshots/",
        ),
        kind(
            "run as base",
            |place| {
                place.write("old/config.toml", "");
                place.with(&[("model.base", "\"old\"")])
            },
            &["old", "run directory"],
            "--format merged",
        ),
        rows("rows.parquet", b"PAR1", &["rows.parquet", "Parquet"], "from_parquet"),
        rows("rows.csv", b"instruction,output\na,b\n", &["rows.csv", "table"], "from_csv"),
        rows("rows.arrow", b"ARROW1", &["rows.arrow", "Arrow"], "from_file"),
        rows("rows.jsonl.gz", b"\x1f\x8b", &["rows.jsonl.gz", "compressed"], "gunzip"),
    ]);
}

#[test]
fn bases() {
    const OWN: &str = "the model's own config.json";
    let layers = "model.layers.0.self_attn.q_proj.weight";
    assert_all_refused(&[
        base_config(json!({"model_type": "phi3"}), &["config.json: model_type", "phi3"], "Llama-family"),
        base_config(json!({"model_type": null}), &["model_type", "llama"], "Llama-family"),
        base_config(json!({"attention_bias": true}), &["q_proj.bias", "missing"], "are they all there"),
        base_config(json!({"mlp_bias": true}), &["gate_proj.bias", "missing"], "are they all there"),
        base_config(json!({"mlp_bias": "no"}), &["config.json: mlp_bias", "true or false"], OWN),
        base_config(json!({"sliding_window": 4096}), &["config.json: sliding_window", "4096"], "full attention"),
        base_config(
            json!({"quantization_config": {"quant_method": "gptq"}}),
            &["quantization_config", "gptq"],
            "original fp32, fp16 or bf16",
        ),
        base_config(json!({"hidden_act": "gelu"}), &["hidden_act", "gelu"], "silu"),
        base_config(
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
            &["rope_parameters", "yarn"],
            "choose another base",
        ),
        base_config(
            json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 2.0}}),
            &["rope_scaling", "linear"],
            "choose another base",
        ),
        base_config(json!({"rope_parameters": null, "rope_scaling": "dynamic"}), &["rope_scaling", "an object"], OWN),
        base_config(
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                       "high_freq_factor": 4.0}}),
            &["rope_parameters", "low_freq_factor"],
            OWN,
        ),
        base_config(json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "0.5"], "rotate wholly"),
        base_config(json!({"num_hidden_layers": 2_000_000_000}), &["num_hidden_layers", "at most"], OWN),
        base_config(json!({"num_hidden_layers": 3}), &["model.layers.2.", "missing", "8 more"], "all there"),
        base_config(json!({"num_hidden_layers": 1}), &["model.layers.1.", "no place"], "config.json"),
        base_config(json!({"hidden_size": null}), &["config.json: hidden_size", "missing"], OWN),
        base_config(json!({"hidden_size": "32"}), &["config.json: hidden_size", "\"32\""], OWN),
        base_config(
            json!({"hidden_size": 64}),
            &["model.embed_tokens.weight", "[320, 32]", "[320, 64]"],
            "config.json",
        ),
        base_config(json!({"num_key_value_heads": 3}), &["num_key_value_heads", "does not divide"], OWN),
        base_config(json!({"tie_word_embeddings": true}), &["lm_head.weight", "differs"], "tie_word_embeddings"),
        file("base/config.json", b"{\"model_type\": ", &["base/config.json", "JSON"], "download"),
        kind(
            "no config.json",
            |place| {
                place.remove("base/config.json");
                place
            },
            &["base/config.json", "cannot be read"],
            "model.safetensors",
        ),
        file("base/model.safetensors", b"version https://git-lfs.github.com/spec/v1", &["git-lfs"], "git lfs pull"),
        file("base/model.safetensors", b"", &["base/model.safetensors", "not a whole"], "again"),
        file("base/model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\xff{}", &["header too large"], "again"),
        base_tensors(|_, data| data.truncate(1000), &["base/model.safetensors", "not a whole"], "compare its size"),
        base_tensors(|_, data| data.push(0), &["base/model.safetensors", "not a whole"], "compare its size"),
        base_tensors(
            |header, _| {
                let other = header["lm_head.weight"].clone();
                header["model.embed_tokens.weight"] = other;
            },
            &["base/model.safetensors", "offset"],
            "again",
        ),
        base_tensors(
            |header, _| header["model.norm.weight"]["shape"] = json!([1_u64 << 40, 1_u64 << 40]),
            &["base/model.safetensors", "not a whole"],
            "again",
        ),
        base_tensors(
            |header, data| {
                header.remove("model.norm.weight").unwrap();
                header.insert("model.norm.bias".into(), tensor("F32", &[32], data.len(), data.len() + 128));
                data.extend([0; 128]);
                fill_gaps(header, data);
            },
            &["model.norm.weight", "missing", "model.norm.bias", "no place"],
            "not supported as a base",
        ),
        base_tensors(
            |header, data| {
                header.insert("model.norm.weight".into(), tensor("F64", &[32], data.len(), data.len() + 256));
                data.extend([0; 256]);
                fill_gaps(header, data);
            },
            &["model.norm.weight", "F64"],
            "quantised",
        ),
        kind(
            "index without its file",
            |place| {
                place.rename("base/model.safetensors", "base/model-1.safetensors");
                let index =
                    json!({"weight_map": {"lm_head.weight": "model-1.safetensors", "x": "model-2.safetensors"}});
                place.write("base/model.safetensors.index.json", index.to_string());
                place
            },
            &["base/model-2.safetensors", "missing"],
            "download this part",
        ),
        kind(
            "index that is wrong about a file",
            move |place| {
                place.rename("base/model.safetensors", "base/model-1.safetensors");
                let index = json!({"weight_map": {layers: "model-1.safetensors", "other": "model-1.safetensors"}});
                place.write("base/model.safetensors.index.json", index.to_string());
                place
            },
            &["index.json", "other is in model-1.safetensors"],
            "download",
        ),
        kind(
            "index that leads elsewhere",
            |place| {
                place.remove("base/model.safetensors");
                let index = json!({"weight_map": {"lm_head.weight": "../rows.jsonl"}});
                place.write("base/model.safetensors.index.json", index.to_string());
                place
            },
            &["index.json", "../rows.jsonl"],
            "download",
        ),
        kind(
            "a tensor in two files",
            |place| {
                for n in 1..=2 {
                    let from = place.path("base/model.safetensors");
                    std::fs::copy(from, place.path(&format!("base/model-{n}.safetensors"))).unwrap();
                }
                place.remove("base/model.safetensors");
                let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
                place.write("base/model.safetensors.index.json", index.to_string());
                place
            },
            &["base/model-2.safetensors", "as well"],
            "not of one model",
        ),
    ]);
}

/// Gives bytes that no tensor of a header covers to tensors that old models have and nobody reads.
fn fill_gaps(header: &mut Map<String, Value>, data: &[u8]) {
    let range = |entry: &Value| [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
    let mut covered: Vec<[usize; 2]> =
        header.iter().filter(|(name, _)| *name != "__metadata__").map(|(_, e)| range(e)).collect();
    covered.sort_unstable();
    let mut end = 0;
    for [from, to] in covered.into_iter().chain([[data.len(); 2]]) {
        if from > end {
            header.insert(format!("old.{end}.rotary_emb.inv_freq"), tensor("U8", &[from - end], end, from));
        }
        end = to;
    }
}

#[test]
fn adapters_to_start_from() {
    const EQUAL: &str = "make the two equal";
    const PLAIN: &str = "only plain LoRA";
    let spoilt = |name, change: fn(&Place), named: &[&'static str], hint| {
        let spoil = move |place: Place| {
            change(&place);
            place.with(&[("model.init_adapter", "\"adapter\"")])
        };
        kind(name, spoil, named, hint)
    };
    assert_all_refused(&[
        init_adapter(json!({"r": 4}), &["lora.r", "has 6", "has 4"], EQUAL),
        init_adapter(json!({"lora_alpha": 16}), &["lora.alpha", "has 9", "has 16"], EQUAL),
        init_adapter(json!({"use_rslora": false}), &["lora.use_rslora"], EQUAL),
        init_adapter(json!({"target_modules": ["q_proj"]}), &["lora.target_modules", "[\"q_proj\"]"], EQUAL),
        init_adapter(json!({"modules_to_save": ["lm_head"]}), &["lora.modules_to_save", "lm_head"], EQUAL),
        init_adapter(json!({"use_dora": true}), &["adapter_config.json: use_dora"], PLAIN),
        init_adapter(json!({"bias": "all"}), &["adapter_config.json: bias", "all"], PLAIN),
        init_adapter(json!({"rank_pattern": {"q_proj": 4}}), &["rank_pattern"], PLAIN),
        init_adapter(json!({"layers_to_transform": [0]}), &["layers_to_transform"], PLAIN),
        init_adapter(json!({"init_lora_weights": "pissa_niter_4"}), &["init_lora_weights", "pissa"], PLAIN),
        init_adapter(json!({"a_variant_to_come": {"x": 1}}), &["a_variant_to_come"], PLAIN),
        init_adapter(json!({"peft_type": "IA3"}), &["peft_type", "IA3"], "only LoRA"),
        init_adapter(json!({"target_modules": ".*_proj"}), &["target_modules", ".*_proj"], "names"),
        init_adapter(json!({"r": "64"}), &["adapter_config.json: r", "\"64\""], "own file"),
        spoilt(
            "adapter_model.bin",
            |place| place.rename("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"),
            &["adapter/adapter_model.safetensors", "missing"],
            "safe_serialization=True",
        ),
        spoilt(
            "no adapter_config.json",
            |place| place.remove("adapter/adapter_config.json"),
            &["adapter/adapter_config.json", "cannot be read"],
            "adapter_model.safetensors",
        ),
        spoilt(
            "a tensor of another adapter",
            |place| {
                place.edit_tensors("adapter/adapter_model.safetensors", |header, data| {
                    let name = "base_model.model.model.embed_tokens.weight";
                    header.insert(name.into(), tensor("F32", &[], data.len(), data.len() + 4));
                    data.extend([0; 4]);
                });
            },
            &["embed_tokens.weight", "no place"],
            "belong together",
        ),
        kind(
            "a base",
            |place| place.with(&[("model.init_adapter", "\"base\"")]),
            &["base/adapter_config.json", "cannot be read"],
            "an adapter is a folder",
        ),
        value("model.init_adapter", "\"adapter/adapter_model.safetensors\"", &["is a file"], "adapter_config.json"),
    ]);
}

#[test]
fn tokenizers() {
    let empty = |name: &'static str, contents: &'static str, named: &[&'static str], hint| {
        let spoil = move |place: Place| {
            place.remove("tokenizer");
            place.write(&format!("tokenizer/{name}"), contents);
            place
        };
        kind(name, spoil, named, hint)
    };
    assert_all_refused(&[
        empty("readme", "", &["tokenizer", "neither a tokenizer.model nor"], "model.tokenizer"),
        empty("vocab.json", "{}", &["tokenizer", "neither a tokenizer.model nor"], "AutoTokenizer"),
        empty("tokenizer.model", "garbage", &["tokenizer/tokenizer.model", "SentencePiece"], "again"),
        empty("tokenizer.model", "version https://git-lfs.github.com", &["git-lfs"], "git lfs pull"),
        empty("tokenizer.json", "{", &["tokenizer/tokenizer.json"], "damaged"),
        value("model.tokenizer", "\"a/b\"", &["no file or folder"], "hf download"),
        value("model.tokenizer", "\"rows.jsonl\"", &["neither a folder"], "tokenizer's files"),
        kind("base without a tokenizer", |place| place.without("model.tokenizer"), &["base"], "model.tokenizer"),
        file("tokenizer/tokenizer_config.json", b"[", &["tokenizer_config.json", "JSON"], "again"),
        file("tokenizer/added_tokens.json", b"{\"<new>\": 0}", &["`<new>`", "0"], "belong together"),
        tokenizer(|json| json["model"]["dropout"] = json!(0.1), &["tokenizer.json", "dropout"], "null"),
        tokenizer(|json| json["pre_tokenizer"] = json!({"type": "New"}), &["tokenizer.json"], "unknown version"),
        tokenizer(
            |json| json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            &["tokenizer.json"],
            "damaged",
        ),
        tokenizer(
            |json| {
                let piece =
                    json!([{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
                json["post_processor"] =
                    json!({"type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": {}});
            },
            &["tokenizer.json"],
            "download the model's own tokenizer files again",
        ),
        tokenizer(
            |json| {
                let vocab = json!([["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["x", -1.0]]);
                json["model"] = json!({"type": "Unigram", "unk_id": null, "vocab": vocab, "byte_fallback": false});
            },
            &["tokenizer.json", "cannot encode"],
            "download the model's own tokenizer files again",
        ),
        tokenizer(
            |json| json["model"]["vocab"]["far"] = json!(5000),
            &["tokenizer.json", "5001 tokens", "base has 320 rows"],
            "model.resize_vocab = true",
        ),
    ]);
}

#[test]
fn data() {
    const GOOD: &str = "{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"}\n";
    let bad_row = |row: &'static [u8], named: &[&'static str], hint| {
        let spoil = move |place: Place| {
            place.write("mixed.jsonl", [GOOD.as_bytes(), row, b"\n", GOOD.as_bytes()].concat());
            place.with(&[("data.train", "\"mixed.jsonl\"")])
        };
        let named: Vec<_> = ["mixed.jsonl:2", "1 of 3 rows are bad"].iter().chain(named).copied().collect();
        kind("bad row", spoil, &named, hint)
    };
    const MEND: &str = "data.max_bad_rows = 1";
    assert_all_refused(&[
        bad_row(b"{\"instruction\": \"a\",", &["not valid JSON"], MEND),
        bad_row(b"{\"instruction\": 1, \"output\": \"b\"}", &["`instruction` must be a string"], MEND),
        bad_row(b"{\"instruction\": \"a\", \"output\": null}", &["no `output`"], MEND),
        bad_row(b"{\"prompt\": \"a\", \"completion\": \"b\"}", &["`prompt`, `completion`"], "{messages}"),
        bad_row(b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", &["user turn"], "add the reply"),
        bad_row(b"{\"messages\": [{\"role\": \"tool\", \"content\": \"a\"}]}", &["`tool`"], "human or user"),
        bad_row(b"{\"instruction\": \"\xc4\xe3\", \"output\": \"b\"}", &["UTF-8"], "iconv"),
        bad_row(
            b"{\"conversations\": [{\"from\": \"system\", \"value\": \"s\"}, {\"from\": \"human\", \"value\": \"a\"}, \
              {\"from\": \"gpt\", \"value\": \"b\"}]}",
            &["system prompt", "`alpaca`"],
            "`system`",
        ),
        rows("rows.jsonl", b"", &["rows.jsonl", "empty"], "instruction"),
        rows("rows.json", b"[]", &["rows.json", "no rows"], "instruction"),
        rows(
            "rows.json",
            b"[{\"instruction\": \"a\", \"output\": \"b\"}",
            &["rows.json:1", "never closed"],
            "this row",
        ),
        rows("rows.json", b"{\n \"instruction\": \"a\",\n \"output\": \"b\"\n}", &["several lines"], "one line"),
        rows("rows.txt", b"hello", &["rows.txt", "neither a JSON array nor"], "one JSON object a line"),
        rows("rows.jsonl", b"\xff\xfe{\0", &["rows.jsonl", "UTF-16"], "iconv"),
        rows("my rows.jsonl", b"{\0\"\0", &["rows.jsonl", "UTF-16"], "rows.jsonl' > rows.jsonl"),
        bad_row(
            b"{\"instruction\": \"a\", \"output\": \"b\", \"weight\": 0}",
            &["not to be learned"],
            "remove the row",
        ),
        bad_row(b"{\"instruction\": \"a\", \"output\": NaN}", &["NaN is no value of JSON"], "pandas"),
        value("data.train", "\"*.none\"", &["no file matches"], "working folder"),
        value("data.train", "\"base\"", &["is a folder"], "base/*.jsonl"),
        value("data.max_length", "10", &["rows.jsonl", "10 have more than 10 tokens"], "raise data.max_length"),
        kind(
            "cut within every prompt",
            |place| place.with(&[("data.max_length", "20"), ("data.truncation", "\"cut\"")]),
            &["data.max_length", "no label token", "rows.jsonl:1"],
            "raise it",
        ),
        kind(
            "validation cut within every prompt",
            |place| {
                let row = json!({"instruction": "long ".repeat(500), "output": "b"});
                place.write("held-out.jsonl", row.to_string());
                place.with(&[
                    ("data.validation", "\"held-out.jsonl\""),
                    ("data.max_length", "400"),
                    ("data.truncation", "\"cut\""),
                ])
            },
            &["data.max_length", "no label token", "held-out.jsonl:1"],
            "raise it",
        ),
        kind(
            "too long is an error",
            |place| place.with(&[("data.max_length", "100"), ("data.truncation", "\"error\"")]),
            &["rows.jsonl:1", "109 tokens", "data.max_length = 100"],
            "\"drop\" or \"cut\"",
        ),
        kind(
            "bad validation rows",
            |place| {
                place.write("held.jsonl", "{\n");
                place.with(&[("data.validation", "\"held.jsonl\"")])
            },
            &["held.jsonl:1"],
            MEND,
        ),
    ]);
}

#[test]
fn commands() {
    let taken = |name, what: &'static str, named: &[&'static str], hint| {
        let spoil = move |place: Place| {
            place.write(what, "mine");
            place
        };
        Kind { call: vec!["train", "c.toml"], ..kind(name, spoil, named, hint) }
    };
    let generate = |arguments: &[&'static str], named: &[&'static str], hint| {
        let call = [&["generate", "adapter", "--base", "base"], arguments].concat();
        let spoil = |place: Place| {
            for name in ["tokenizer.json", "tokenizer_config.json"] {
                std::fs::copy(place.path("tokenizer").join(name), place.path("adapter").join(name)).unwrap();
            }
            place
        };
        Kind { call, ..kind("generate", spoil, named, hint) }
    };
    let export = |from, out, named: &[&'static str], hint| {
        call(&["export", from, "--base", "base", "--format", "merged", "--out", out], named, hint)
    };
    let mut no_bos = generate(&["--raw", "--prompt", ""], &["--prompt", "no tokens"], "write some text");
    let spoil = no_bos.spoil;
    no_bos.spoil = Box::new(move |place| {
        let place = spoil(place);
        place.edit_json("adapter/tokenizer_config.json", &json!({"add_bos_token": false}));
        place
    });
    assert_all_refused(&[
        taken("a run", "run/config.toml", &["train.output", "holds a run already"], "bellora resume"),
        taken("someone's adapter", "run/adapter/notes.txt", &["train.output", "holds adapter"], "another folder"),
        taken("someone's metrics", "run/metrics.jsonl", &["train.output", "holds metrics.jsonl"], "another folder"),
        call(&["resume", "base"], &["base", "holds no run"], "bellora train"),
        call(&["resume", "nowhere"], &["nowhere", "holds no run"], "bellora train"),
        call(&["eval", "c.toml"], &["data.validation", "nothing to evaluate"], "--set data.validation=FILE"),
        call(&["eval", "adapter"], &["adapter", "holds no run"], "init_adapter"),
        call(&["prepare", "c.toml", "--dump", "c.toml"], &["--dump", "c.toml", "read"], "another file"),
        call(&["prepare", "c.toml", "--dump", "no/where"], &["--dump", "no/where"], "another file"),
        export("base", "out", &["base itself"], "--base"),
        export("nowhere", "out", &["nowhere", "does not exist"], "not downloaded"),
        export("rows.jsonl", "out", &["rows.jsonl", "is a file"], "run directory"),
        export("tokenizer", "out", &["tokenizer", "adapter_config.json"], "one of these files"),
        export("adapter", "base", &["--out", "base", "not empty"], "new folder"),
        export("adapter", "rows.jsonl/out", &["--out", "is a file"], "new folder"),
        call(
            &["export", "base", "--format", "merged", "--out", "out"],
            &["base", "without an adapter"],
            "run directory",
        ),
        call(
            &["export", "adapter", "--base", "nowhere", "--format", "peft", "--out", "out"],
            &["nowhere", "not there"],
            "--base DIR",
        ),
        generate(&["--prompt", "x", "--top-p", "0"], &["--top-p", "above 0"], "leave it out"),
        generate(&["--prompt", "x", "--temperature", "-1"], &["--temperature", "from 0"], "leave it out"),
        generate(&["--prompt", "x", "--max-new-tokens", "99999999999999"], &["--max-new-tokens"], "256"),
        generate(&["--prompt", "x", "--template", "vicuna"], &["--template", "vicuna"], "chinese-alpaca"),
        no_bos,
        Kind {
            call: vec!["generate", "adapter", "--prompt", "x"],
            ..kind(
                "a base of the hub",
                |place| {
                    place.edit_json(
                        "adapter/adapter_config.json",
                        &json!({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}),
                    );
                    place
                },
                &["adapter_config.json", "meta-llama/Llama-2-7b-hf"],
                "--base DIR",
            )
        },
        Kind {
            call: vec!["generate", "adapter", "--base", "base", "--prompt", "x"],
            ..kind(
                "a table without rows and columns",
                |place| {
                    place.edit_json("adapter/adapter_config.json", &json!({"modules_to_save": ["lm_head"]}));
                    place.edit_tensors("adapter/adapter_model.safetensors", |header, data| {
                        let name = "base_model.model.lm_head.weight";
                        header.insert(name.into(), tensor("F32", &[], data.len(), data.len() + 4));
                        data.extend([0; 4]);
                    });
                    place
                },
                &["lm_head.weight", "shape []"],
                "belong together",
            )
        },
    ]);
}

/// `train`, `prepare` and `eval` refuse what `check` refuses, in the same words, before they make any file.
#[test]
fn every_command_says_what_check_says() {
    let place = Place::new().with(&[("lora.r", "0"), ("data.validation", "\"rows.jsonl\"")]);
    place.write_config();
    let other = Place::new().with(&[("data.validation", "\"rows.jsonl\"")]);
    other.write_config();
    other.edit_json("base/config.json", &json!({"attention_bias": true}));
    other.write("tokenizer/tokenizer.json", "{");
    for place in [place, other] {
        let before = place.tree();
        let check = place.run(&["check", "c.toml"]).refused(&["hint: "]);
        for command in ["train", "prepare", "eval"] {
            assert_eq!(place.run(&[command, "c.toml"]).refused(&[]).stderr, check.stderr, "{command}");
        }
        assert!(place.tree() == before, "files were made or changed");
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// What shows only while running is exit code 1; a write that fails leaves no half-made file.
#[test]
fn failures_while_running() {
    let place = Place::new();
    place.write_config();
    let before = place.tree();
    // Root may write anywhere, until it tries; for others the folder is closed, as can be seen beforehand.
    let code = Some(if is_root() { 1 } else { 2 });
    let ran = place.run(&["train", "c.toml", "--set", "data.cache_dir=/proc/none"]);
    assert_eq!(ran.code, code, "{ran:?}");
    assert!(ran.stderr.contains("/proc") && ran.stderr.contains("hint: "), "{ran:?}");
    let ran = place.run(&["export", "adapter", "--base", "base", "--format", "peft", "--out", "/proc/none/out"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("/proc/none") && ran.stderr.contains("hint: "), "{ran:?}");
    assert!(place.tree() == before, "files were made or changed");
    let ran = place.run(&["train", "c.toml", "--set", "train.output=/proc/none"]);
    assert_eq!(ran.code, code, "{ran:?}");
    assert!(ran.stderr.contains("/proc") && ran.stderr.contains("hint: "), "{ran:?}");
}

#[test]
fn a_folder_that_may_not_be_written_in_is_refused_beforehand() {
    let place = Place::new();
    place.write_config();
    let closed = place.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    std::fs::set_permissions(place.path("."), PermissionsExt::from_mode(0o755)).unwrap();
    for key in ["train.output", "data.cache_dir"] {
        let mut process = Command::new(env!("CARGO_BIN_EXE_bellora"));
        process.args(["check", "c.toml", "--set", &format!("{key}=closed/run")]).current_dir(place.path("."));
        // Nothing is closed to root.
        if is_root() {
            process.uid(65534).gid(65534).env("HOME", place.path("."));
        }
        match process.output() {
            Err(error) => println!("not tried as another user, who may not run the program: {error}"),
            Ok(output) => {
                Ran::from(output).refused(&[key, "you may not write in", "closed", "hint: "]);
            }
        }
    }
}
