//! `bellora bench` and what it stands on: shapes, drawn weights, lengths, the counting of operations.

use std::collections::BTreeSet;

use bellora::data::Dataset;
use bellora::data::lengths::{Length, Lengths};
use bellora::model::flops::{Flops, TokenMix};
use bellora::model::lora::LoraSpec;
use bellora::model::shape::{ModelShape, Projection, Table};
use bellora::model::shapes;
use bellora::model::weights::BaseWeights;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::place::{Place, golden};
use crate::support::{bellora, run};

/// Parameters of a base, tables counted once where they are one.
fn n_params(shape: &ModelShape) -> i64 {
    let projections: i64 = Projection::ALL.iter().map(|p| p.shape(shape).iter().product::<i64>()).sum();
    let tables = if shape.tie_word_embeddings { 1 } else { 2 };
    let layers = shape.num_hidden_layers as i64;
    let biases: i64 = shape.biases.iter().map(|p| p.shape(shape)[0]).sum();
    let head_norms = if shape.has_head_norms { 2 * shape.head_dim } else { 0 };
    layers * (projections + biases + head_norms + 2 * shape.hidden_size)
        + shape.hidden_size
        + tables * shape.vocab_size * shape.hidden_size
}

#[test]
fn shapes_have_the_published_numbers_of_parameters() {
    for (name, published) in [
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ] {
        let shape = shapes::open(name, None, &[]).unwrap();
        assert_eq!(n_params(&shape), published, "{name}");
        assert!(shape.has_head_norms || shape.heads().q_width() == shape.hidden_size, "{name}");
    }
    assert!(shapes::NAMES.into_iter().all(|name| shapes::named(name).is_some()));
    assert_eq!(shapes::open("llama-2-7b", Some(49_954), &[]).unwrap().vocab_size, 49_954);
    // A folder, or the file itself under any name.
    let base = golden().join("base");
    let of_folder = shapes::open(base.to_str().unwrap(), None, &[]).unwrap();
    let of_file = shapes::open(base.join("config.json").to_str().unwrap(), None, &[]).unwrap();
    assert_eq!((of_folder.hidden_size, of_file.hidden_size), (32, 32));
}

#[test]
fn drawn_weights_are_normal_and_norms_are_one() {
    // Other tests draw from the same generator meanwhile, so that only what the draws are like is looked at here; that
    // they depend on the seed alone is seen in the losses of whole programs below.
    let shape = shapes::named("smollm2-135m").unwrap();
    let drawn = |name: &str, size: &[i64], kind| {
        BaseWeights::Random { seed: 3 }.tensor(name, size, &shape, (kind, Device::Cpu)).unwrap()
    };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let norm_d = drawn("model.norm.weight", &[576], kind);
        assert_eq!(norm_d.kind(), kind);
        assert!(norm_d.eq(1.0).all().int64_value(&[]) == 1);
        let matrix = drawn("lm_head.weight", &[400, 500], kind).to_kind(Kind::Double);
        let (mean, std) = (matrix.mean(Kind::Double).double_value(&[]), matrix.std(true).double_value(&[]));
        // 200,000 draws: the error of the mean is 0.0022 of the deviation, that of the deviation 0.0016; five times that,
        // and bf16's rounding.
        assert!(mean.abs() < 0.012 / 24.0, "{kind:?}: mean {mean}");
        assert!((std * 24.0 - 1.0).abs() < 0.012, "{kind:?}: deviation {std}, not 1/24");
    }
}

#[test]
fn operations_of_the_reference_job_are_those_of_the_design() {
    let shape = shapes::open("llama-2-7b", Some(49_954), &[]).unwrap();
    let lora = LoraSpec {
        r: 64,
        alpha: 128.0,
        dropout: 0.05,
        use_rslora: false,
        target_modules: Projection::ALL.to_vec(),
        modules_to_save: Table::ALL.to_vec(),
    };
    let mix = TokenMix { learned_share: 1.0, attended: 95.0 };
    let flops = Flops::a_token(&shape, &lora, mix, true);
    let giga = |x: f64| (x / 1e7).round() / 100.0;
    assert_eq!(
        [flops.base_forward, flops.base_backward, flops.lora, flops.head, flops.attention].map(giga),
        [12.95, 12.95, 0.96, 1.23, 0.15]
    );
    assert_eq!(giga(flops.total()), 28.24);
    assert_eq!(giga(flops.total() + flops.recompute), 41.56);
    assert_eq!(Flops::a_token(&shape, &lora, mix, false).recompute, 0.0);
    // Without a trained embedding nothing is carried through the lowest queries, keys and values.
    let frozen = Flops::a_token(&shape, &LoraSpec { modules_to_save: vec![], ..lora }, mix, false);
    assert_eq!(flops.base_backward - frozen.base_backward, 2.0 * 3.0 * 4096.0 * 4096.0);
    assert_eq!(flops.lora - frozen.lora, 2.0 * 3.0 * 64.0 * 4096.0);
    assert_eq!(frozen.head * 1.5, flops.head);
    // Long documents weigh more: 10 and 30 tokens, 16 of them learned.
    let mix = TokenMix::of([(10, 6), (30, 10)].into_iter());
    assert_eq!(mix, TokenMix { learned_share: 0.4, attended: (55.0 + 465.0) / 40.0 });
}

#[test]
fn lengths_of_belle_are_built_in() {
    let belle = Lengths::belle().unwrap();
    assert_eq!(belle.samples().len(), 1000);
    // What was counted when the file was made, to the digit that data/README.md gives.
    assert_eq!((belle.mean_tokens().round(), belle.mean_learned().round()), (175.0, 102.0));
    assert_eq!(belle.longest(), 620);
}

#[test]
fn lengths_are_drawn_all_before_any_again() {
    let belle = Lengths::belle().unwrap();
    let drawn = belle.draw(2500, 7);
    for thousand in drawn.chunks(1000) {
        let mut sorted = thousand.to_vec();
        sorted.sort();
        assert_eq!(thousand.len() == 1000, sorted == belle.samples());
    }
    assert!(drawn[..1000] != drawn[1000..2000], "each round has its own order");
    assert!(drawn == belle.draw(2500, 7) && drawn != belle.draw(2500, 8), "an order is the seed's");
    assert_eq!(Lengths::equal(9).unwrap().draw(2, 1), [Length { tokens: 9, learned: 8 }; 2]);
}

#[test]
fn random_samples_have_the_lengths_that_were_asked_for() {
    let lengths =
        [Length { tokens: 7, learned: 3 }, Length { tokens: 2, learned: 1 }, Length { tokens: 4, learned: 0 }];
    let samples = Dataset::random(&lengths, 11, 5);
    assert_eq!(samples.len(), 3);
    for (sample, length) in lengths.iter().enumerate() {
        assert_eq!(samples.ids(sample).len(), length.tokens as usize);
        assert_eq!(samples.label_tokens(sample), length.learned as usize);
        assert!(samples.ids(sample).iter().all(|id| *id < 11));
    }
    let all = |samples: &Dataset| (0..3).flat_map(|sample| samples.ids(sample).to_vec()).collect::<Vec<_>>();
    assert_eq!(all(&samples), all(&Dataset::random(&lengths, 11, 5)));
    assert_ne!(all(&samples), all(&Dataset::random(&lengths, 11, 6)));
    assert_eq!(samples.stats().rows, 3);
}

const LENGTHS: &str = r#"{"format": "bellora lengths 1", "about": "four samples",
    "lengths": [[6, 3, 2], [10, 4, 1], [3, 0, 1]]}"#;

/// A call of the program on a tiny shape, in fp32 so that it means the same on every machine.
fn bench(place: &Place, more: &[&str]) -> Value {
    let call = ["bench", "--shape", "tiny", "--json", "--set", "model.dtype=fp32", "--set", "model.device=cpu"];
    let ran = place.run(&[&call[..], more].concat()).ok();
    assert_eq!(ran.stdout.lines().count(), 1, "standard output is the data alone: {ran:?}");
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn a_tiny_shape_is_measured_and_everything_counted() {
    let place = Place::new();
    place.write("lengths.json", LENGTHS);
    let before = place.tree();
    let sets = ["--set", "train.global_batch=4", "--set", "lora.r=4", "--set", "lora.dropout=0.1"];
    let sizes = ["--lengths", "lengths.json", "--updates", "3", "--warmup", "1", "--micro-batch-tokens", "16"];
    let found = bench(&place, &[&sets[..], &sizes].concat());
    assert!(place.tree() == before, "files were made or changed");

    let updates = found["updates"].as_array().unwrap();
    assert_eq!(updates.len(), 3);
    for update in updates {
        // Four samples an update, and four in the file: each update takes them all.
        assert_eq!([&update["samples"], &update["tokens"], &update["label_tokens"]], [4, 25, 10]);
        assert_eq!(update["skipped"], false);
        let (secs, speed) = (update["secs"].as_f64().unwrap(), update["tokens_per_s"].as_f64().unwrap());
        assert!(secs > 0.0 && (speed * secs - 25.0).abs() < 1e-6, "{update}");
        // Random ids by random weights: what a vocabulary of 512 costs.
        let loss = update["loss"].as_f64().unwrap();
        assert!((loss - 512f64.ln()).abs() < 0.5, "{loss}");
    }
    let mut speeds: Vec<f64> = updates.iter().map(|u| u["tokens_per_s"].as_f64().unwrap()).collect();
    speeds.sort_by(f64::total_cmp);
    assert_eq!(found["tokens_per_s"].as_f64().unwrap(), speeds[1]);

    assert_eq!(found["data"]["samples"], "four samples");
    assert_eq!([&found["data"]["mean_tokens"], &found["data"]["mean_label_tokens"]], [6.25, 2.5]);
    assert_eq!([&found["global_batch"], &found["micro_batch_tokens"], &found["warmup"]], [4, 16, 1]);
    // Micro-batches of 16 and 9 tokens at best; evened out 13 and 12, without the three that have nothing to learn 12 and 10.
    assert_eq!(found["memory"]["largest_micro_batch"], 12);

    // By hand: hidden 64, feed-forward 176, 4 heads of 16, 2 of them for keys and values, 2 layers, rank 4.
    let (qkv, o, mlp) = (64.0 * 64.0 + 2.0 * 64.0 * 32.0, 64.0 * 64.0, 3.0 * 64.0 * 176.0);
    let forward = 2.0 * 2.0 * (qkv + o + mlp);
    let ranks = 4.0 * ((64.0 + 64.0) * 2.0 + (64.0 + 32.0) * 2.0 + (64.0 + 176.0) * 3.0);
    let attended = (21.0 + 21.0 + 55.0 + 6.0) / 25.0;
    let flops = [
        ("base_forward", forward),
        // No gradient for what lies beneath the lowest adapters, the embedding being frozen.
        ("base_backward", forward - 2.0 * qkv),
        ("lora", 6.0 * 2.0 * ranks - 2.0 * 3.0 * 4.0 * 64.0),
        ("head", 4.0 * 512.0 * 64.0 * 10.0 / 25.0),
        ("attention", 6.0 * 2.0 * 2.0 * 64.0 * attended),
        ("recompute", 0.0),
    ];
    for (part, by_hand) in flops {
        let ours = found["flops_per_token"][part].as_f64().unwrap();
        assert!((ours - by_hand).abs() <= 1e-9 * by_hand, "{part}: {ours}, by hand {by_hand}");
    }
    let total: f64 = flops.iter().map(|(_, n)| n).sum();
    let tflops = found["tflops"].as_f64().unwrap();
    assert!((tflops - total * speeds[1] / 1e12).abs() < 1e-9 * tflops);
    let mfu = tflops / found["ceiling"]["tflops"].as_f64().unwrap();
    assert!((found["mfu"].as_f64().unwrap() - mfu).abs() < 1e-9 * mfu);

    assert_eq!(found["parts"]["updates"], 3);
    for part in ["input_secs", "forward_secs", "head_secs", "backward_secs", "optimizer_secs"] {
        assert!(found["parts"][part].as_f64().unwrap() > 0.0, "{part}");
    }
    let memory = &found["memory"];
    let number = |key: &str| memory[key].as_i64().unwrap();
    assert!(number("before_bytes") > 0 && number("peak_bytes") >= number("before_bytes"), "{memory}");
    // A CPU has no allocator of its own to ask.
    assert!(memory.as_object().unwrap().contains_key("allocator") && memory["allocator"].is_null(), "{memory}");
    let by_part: i64 = memory["predicted"].as_array().unwrap().iter().map(|part| part["bytes"].as_i64().unwrap()).sum();
    assert_eq!(number("predicted_bytes"), by_part);

    assert_eq!(found["model"]["name"], "tiny");
    assert_eq!(found["model"]["random_weights"], true);
    assert_eq!(found["model"]["frozen_params"], n_params(&shapes::named("tiny").unwrap()));
    assert_eq!(found["model"]["trainable_params"], 2 * ranks as i64);
    assert_eq!(found["lora"]["r"], 4);
    assert_eq!(found["device"]["kind"], "cpu");
    assert_eq!(found["device"]["threads"], 1);
    assert_eq!(found["dtype"], "fp32");
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(found["recompute"], false);
}

#[test]
fn a_seed_means_the_same_weights_and_samples() {
    let place = Place::new();
    let losses = |seed: &str| {
        let set = format!("train.seed={seed}");
        let few = ["--updates", "2", "--warmup", "0", "--lengths", "24", "--set", "train.global_batch=3"];
        let found = bench(&place, &[&few[..], &["--set", &set, "--set", "lora.dropout=0.1"]].concat());
        let updates = found["updates"].as_array().unwrap().clone();
        assert!(updates.iter().all(|update| update["tokens"] == 72 && update["label_tokens"] == 69), "{found}");
        updates.into_iter().map(|update| update["loss"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(losses("1"), losses("1"));
    // The first loss is of the base alone: no B has moved yet.
    assert_ne!(losses("1")[0], losses("2")[0]);
}

#[test]
fn a_config_gives_all_but_the_files_to_a_shape() {
    let place = Place::new().with(&[("lora.modules_to_save", "[\"embed_tokens\", \"lm_head\"]")]);
    place.write_config();
    for file in ["base", "tokenizer", "rows.jsonl"] {
        place.remove(file);
    }
    let few =
        ["bench", "c.toml", "--shape", "tiny", "--vocab-size", "320", "--updates", "1", "--warmup", "0", "--json"];
    let ran = place.run(&few).ok();
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!([&found["model"]["vocab_size"], &found["lora"]["r"], &found["global_batch"]], [320, 6, 4]);
    assert_eq!(found["lora"]["target_modules"], json!(["q_proj", "k_proj", "v_proj", "o_proj"]));
    assert_eq!(found["lora"]["modules_to_save"], json!(["embed_tokens", "lm_head"]));
    // Lengths are BELLE's where none are given, in the order of the seed.
    let first = Lengths::belle().unwrap().draw(4, 42);
    let tokens: u32 = first.iter().map(|length| length.tokens).sum();
    assert_eq!(found["updates"][0]["tokens"], tokens);
    // What no file says is still judged.
    place.run(&[&few[..], &["--set", "lora.r=0"]].concat()).refused(&["lora.r", "at least 1"]);
}

#[test]
fn a_config_alone_is_measured_as_it_would_be_trained() {
    let place = Place::new().with(&[("data.shuffle", "false")]);
    place.write_config();
    let ran = place.run(&["bench", "c.toml", "--updates", "3", "--warmup", "0", "--json"]).ok();
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(found["model"]["random_weights"], false);
    assert_eq!(found["model"]["hidden_size"], 32);
    // Ten samples by four.
    let of =
        |key: &str| found["updates"].as_array().unwrap().iter().map(|u| u[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(of("samples"), [4, 4, 2]);
    assert_eq!(of("tokens").iter().sum::<u64>(), 1135);
    assert_eq!(of("label_tokens").iter().sum::<u64>(), 173);
    assert!(found["data"]["samples"].as_str().unwrap().ends_with("rows.jsonl"));
    // The same base on samples of another length than the config's own longest, and the report as a table.
    let call = ["bench", "c.toml", "--lengths", "300", "--updates", "1", "--warmup", "0"];
    let table = place.run(&call).ok().stdout;
    for told in ["tokens/s ", "MFU ", "300.0 tokens each, 299.0 of them learned", "2 layers, hidden 32", "backward "] {
        assert!(table.contains(told), "{told:?} is not in:\n{table}");
    }
    assert!(table.lines().all(|line| line.trim_end() == line));
}

#[test]
fn what_cannot_be_measured_is_refused_with_a_hint() {
    let place = Place::new();
    place.write_config();
    let before = place.tree();
    let refused = |arguments: &[&str], words: &[&str]| {
        place.run(&[&["bench"], arguments].concat()).refused(&[words, &["hint: "]].concat());
    };
    refused(&[], &["neither a config nor a shape", "llama-2-7b"]);
    refused(&["--shape", "llama-9"], &["--shape", "\"llama-9\" is neither a known shape nor a file", "tinyllama-1.1b"]);
    refused(&["--shape", "c.toml"], &["c.toml", "is not a JSON object"]);
    refused(&["--shape", "tiny", "--vocab-size", "1"], &["--vocab-size", "found 1"]);
    refused(&["--shape", "tiny", "--lengths", "1"], &["--lengths", "found 1"]);
    refused(&["--shape", "tiny", "--lengths", "none.json"], &["none.json", "cannot be read", "data/README.md"]);
    refused(
        &["--shape", "tiny", "--lengths", "64", "--micro-batch-tokens", "63"],
        &["train.micro_batch_tokens", "63", "64", "--micro-batch-tokens 64"],
    );
    refused(&["none.toml", "--shape", "tiny"], &["none.toml", "cannot be read"]);
    assert!(place.tree() == before, "files were made or changed");

    // 270 TB of weights.
    let mut giant: Value = serde_json::from_slice(&std::fs::read(golden().join("base/config.json")).unwrap()).unwrap();
    let large = [("hidden_size", 65_536), ("intermediate_size", 262_144), ("num_hidden_layers", 1000)];
    let heads = [("num_attention_heads", 512), ("num_key_value_heads", 512), ("head_dim", 128)];
    for (key, value) in large.into_iter().chain(heads) {
        giant[key] = json!(value);
    }
    place.write("giant.json", giant.to_string());
    refused(&["--shape", "giant.json"], &["needs ", " are free", "a smaller shape"]);

    let lengths = |text: &str, words: &[&str]| {
        place.write("l.json", text);
        refused(&["--shape", "tiny", "--lengths", "l.json"], &[&["l.json"], words].concat());
    };
    let with =
        |entries: &str| format!("{{\"format\": \"bellora lengths 1\", \"about\": \"\", \"lengths\": [{entries}]}}");
    lengths("[[5, 3, 1]]", &["is not a file of lengths"]);
    lengths(&with("[5, 3]"), &["is not a file of lengths"]);
    lengths(&with("").replace("lengths 1", "lengths 2"), &["\"bellora lengths 2\""]);
    lengths(&with(""), &["has no sample with anything to learn"]);
    lengths(&with("[5, 0, 3]"), &["anything to learn"]);
    lengths(&with("[5, 3, 1], [5, 5, 1]"), &["lengths[1]", "found [5, 5, 1]"]);
    lengths(&with("[1, 0, 1]"), &["lengths[0]", "2 to 1048576 tokens"]);
    lengths(&with("[5, -1, 1]"), &["lengths[0]"]);
    lengths(&with("[5, 3, 0]"), &["lengths[0]", "at least one sample"]);
    lengths(&with("[5, 3, 9999999], [5, 3, 2]"), &["lengths[1]", "10000000 in all"]);
}

#[test]
fn the_dtype_of_the_fastest_products_comes_first() {
    let bench = |more: &[&str]| run(bellora().args(["bench", "--dtypes", "--set", "model.device=cpu"]).args(more));
    let speeds: Vec<Value> = serde_json::from_str(&bench(&["--json"]).ok().stdout).unwrap();
    let number = |speed: &Value| speed["tflops"].as_f64().unwrap();
    let names: BTreeSet<_> = speeds.iter().map(|speed| speed["dtype"].as_str().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["bf16", "fp32"]));
    assert!(speeds.len() == 2 && number(&speeds[0]) >= number(&speeds[1]) && number(&speeds[1]) > 0.0, "{speeds:?}");
    // What scripts/quickstart.sh takes is the first word.
    let first = bench(&[]).ok().stdout;
    assert!(names.contains(first.split(' ').next().unwrap()), "{first}");
    let refused = bench(&["--shape", "tiny"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("--shape"), "{}", refused.stderr);
}

#[test]
fn a_trace_names_what_ran_with_its_time() {
    let place = Place::new();
    let few = ["--updates", "1", "--warmup", "0", "--lengths", "24", "--set", "train.global_batch=3"];
    let found = bench(&place, &[&few[..], &["--trace", "trace.json"]].concat());
    let file: Value = serde_json::from_slice(&std::fs::read(place.path("trace.json")).unwrap()).unwrap();
    let events = file["events"].as_array().unwrap();
    assert_eq!([&found["trace"]["updates"], &file["updates"]], [2, 2]);
    assert_eq!(found["trace"]["n_events"], events.len());
    let names: Vec<&str> = file["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let calls = |wanted: &str| {
        let index = names.iter().position(|name| *name == wanted).unwrap_or_else(|| panic!("no {wanted} in {names:?}"));
        events.iter().filter(|event| event[0] == index).count()
    };
    // One micro-batch of three samples an update: one loss, one optimizer step, a product with each of 7 adapters' B in 2 layers.
    assert_eq!(calls("aten::_fused_adamw_"), 2);
    assert!(calls("aten::addmm") >= 2 * 2 * 7);
    assert!(calls("aten::_scaled_dot_product_flash_attention_for_cpu_backward") >= 2 * 2);
    // No event reaches beyond the updates, and what none of them called takes no longer than they did.
    let secs = file["secs"].as_f64().unwrap();
    let ends = events.iter().map(|event| (event[2].as_f64().unwrap() + event[3].as_f64().unwrap()) / 1e9);
    assert!(ends.fold(0.0, f64::max) < secs + 1.0);
    let kernels = found["trace"]["kernels"].as_array().unwrap();
    let total: f64 = kernels.iter().map(|kernel| kernel["secs"].as_f64().unwrap()).sum();
    assert!(total > 0.0 && total <= secs, "{total} of {secs}");
    assert_eq!(kernels.iter().map(|kernel| kernel["calls"].as_u64().unwrap()).sum::<u64>(), events.len() as u64);
    assert!(kernels.windows(2).all(|pair| pair[0]["secs"].as_f64() >= pair[1]["secs"].as_f64()));
    // A file that cannot be is refused before anything is measured.
    let refused = |file: &str, words: &[&str]| {
        place.run(&["bench", "--shape", "tiny", "--trace", file]).refused(&[&["--trace", "hint: "], words].concat());
    };
    refused("none/trace.json", &["none is no folder"]);
    refused("base", &["base is a folder"]);
}

#[test]
fn every_piece_of_a_block_is_timed() {
    let call = ["--set", "train.global_batch=4", "--set", "lora.r=4", "--lengths", "24", "--pieces"];
    let found = bench(&Place::new(), &call);
    let settings = &found["settings"];
    assert_eq!([&settings["rows"], &settings["documents"], &settings["hidden"], &settings["r"]], [96, 4, 64, 4]);
    let pieces = found["pieces"].as_array().unwrap();
    let of = |start: &str| {
        let named = |piece: &&Value| piece["name"].as_str().unwrap().starts_with(start);
        pieces.iter().filter(named).collect::<Vec<_>>()
    };
    let counts =
        [("frozen", 8), ("adapter", 11), ("fp32", 8), ("joined", 4), ("fp8", 4), ("attention", 2), ("norm", 3)];
    for (start, count) in
        counts.into_iter().chain(["copy", "dropout", "rope"].map(|one| (one, 1))).chain([("swiglu", 2)])
    {
        assert_eq!(of(start).len(), count, "{start}");
        for piece in of(start) {
            // A CPU may lack fp8, and nothing else.
            if start == "fp8" && piece["not_available"].as_str().is_some_and(|why| why.starts_with("not available: ")) {
                continue;
            }
            let (median, fastest) = (piece["median_s"].as_f64().unwrap(), piece["fastest_s"].as_f64().unwrap());
            assert!(0.0 < fastest && fastest <= median && piece.get("not_available").is_none(), "{piece}");
            let has = |key: &str| piece[key].as_f64().is_some_and(|rate| rate > 0.0);
            assert!(has("flops_per_s") != has("bytes_per_s"), "{piece}");
        }
    }
    assert_eq!(pieces.len(), 8 + 11 + 8 + 4 + 4 + 2 + 3 + 3 + 2);
    // By hand: [96, 64] by [128, 64], and the causal pairs of four documents of 24 tokens.
    let work = |name: &str, key: &str| of(name)[0][key].as_f64().unwrap() * of(name)[0]["median_s"].as_f64().unwrap();
    for (name, by_hand) in [
        ("frozen qkv", 2.0 * 96.0 * 128.0 * 64.0),
        ("adapter B k", 2.0 * 96.0 * 32.0 * 4.0),
        ("joined down", 2.0 * 96.0 * 64.0 * 180.0),
        ("attention", 4.0 * 4.0 * 300.0 * 64.0),
    ] {
        assert!((work(name, "flops_per_s") - by_hand).abs() < 1e-6 * by_hand, "{name}");
    }
    assert!((work("copy", "bytes_per_s") - 2.0 * 96.0 * 64.0 * 4.0).abs() < 1e-3);
    // The same as a table.
    let table = run(bellora().args(["bench", "--shape", "tiny", "--set", "model.device=cpu"]).args(call)).ok().stdout;
    assert!(table.lines().any(|line| line.starts_with("frozen gate_up") && line.ends_with("TFLOP/s")), "{table}");
    assert!(table.lines().any(|line| line.starts_with("copy ") && line.ends_with("GB/s")), "{table}");
}

#[test]
fn options_that_a_way_of_measuring_does_not_read_are_refused() {
    for way in [&["--pieces", "--shape", "tiny"][..], &["--dtypes"]] {
        for (option, value) in [("--updates", "3"), ("--warmup", "1"), ("--micro-batch-tokens", "64")] {
            let ran = run(bellora().arg("bench").args(way).args([option, value]));
            assert_eq!(ran.code, Some(2), "{}", ran.stderr);
            assert!(ran.stderr.contains(option) && ran.stderr.contains("cannot be used with"), "{}", ran.stderr);
        }
    }
}
