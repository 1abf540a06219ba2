//! The config: every fault at once, names of other trainers, overrides, the round trip.

mod document;

use std::path::{Path, PathBuf};

use bellora::config::{Auto, Config, Dtype, Duration, TARGET_MODULES, Warmup, values_of};
use bellora::error::{Error, Fault};

/// A folder with a base, a data file and a place for the run.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("base")).unwrap();
        std::fs::write(dir.path().join("rows.jsonl"), "").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn touch(&self, name: &str) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), "").unwrap();
    }

    /// The smallest config, with `DIR` for the folder, and more lines in each section.
    fn text(&self, model: &str, lora: &str, data: &str, train: &str) -> String {
        let dir = self.dir.path().display();
        format!(
            "[model]\nbase = \"{dir}/base\"\n{model}\n[lora]\n{lora}\n[data]\ntrain = \"{dir}/rows.jsonl\"\n{data}\n\
             [train]\noutput = \"{dir}/run\"\n{train}\n"
        )
        .replace("DIR", &dir.to_string())
    }

    fn minimal(&self) -> String {
        self.text("", "", "", "")
    }
}

fn parse(text: &str, sets: &[&str]) -> Result<Config, Error> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Config::parse(text, "c.toml", &sets)
}

fn faults(text: &str, sets: &[&str]) -> Vec<Fault> {
    match parse(text, sets) {
        Err(Error::Invalid(faults)) => faults,
        other => panic!("expected faults of the input, got {other:?}\n{text}"),
    }
}

/// The only fault of a config.
fn fault(text: &str, sets: &[&str]) -> Fault {
    let mut all = faults(text, sets);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

/// Holds the wording loosely: the parts a user needs, in place, problem and hint.
fn holds(fault: &Fault, place: &str, what: &str, hint: &str) {
    let is_told = fault.place.ends_with(place) && fault.what.contains(what) && fault.hint.contains(hint);
    assert!(is_told, "expected {place:?} / {what:?} / {hint:?} in {fault:#?}");
}

#[test]
fn defaults_are_those_of_the_contract() {
    let place = Place::new();
    // As some editors write it: with a byte order mark and carriage returns.
    let text = format!("\u{feff}{}", place.minimal().replace('\n', "\r\n"));
    let config = parse(&text, &[]).unwrap();
    let dir = place.dir.path().display();
    let cache = &config.data.cache_dir;
    assert!(cache.is_absolute() && cache.ends_with("bellora"), "{cache:?}");
    let expected = format!(
        r#"[model]
base = "{dir}/base"
tokenizer = "{dir}/base"
dtype = "auto"
device = "auto"
resize_vocab = false
new_rows = "normal"
allow_config_keys = []

[lora]
r = 64
alpha = 128.0
dropout = 0.05
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
modules_to_save = []
use_rslora = false

[data]
train = ["{dir}/rows.jsonl"]
validation = []
validation_fraction = 0.0
template = "alpaca"
learn = "auto"
max_length = 512
truncation = "drop"
special_tokens = "special"
shuffle = true
max_bad_rows = 0
cache_dir = "{}"
cache_max_gb = 50

[train]
output = "{dir}/run"
epochs = 1
global_batch = 64
micro_batch_tokens = "auto"
learning_rate = 0.0004
schedule = "cosine"
warmup_ratio = 0.001
weight_decay = 0.0
betas = [0.9, 0.999]
eps = 1e-8
max_grad_norm = 1.0
loss_average = "tokens"
loss_group_samples = 1
seed = 42
recompute = "auto"
shard = "auto"
deterministic = false
non_finite = "stop"
max_non_finite = 10
checkpoint_every = 200
keep_checkpoints = 3
keep_best = 0
keep_steps = []
eval_every = 200
log_every = 1
save_dtype = "fp32"
"#,
        cache.display()
    );
    assert_eq!(config.to_toml(), expected);
    assert_eq!(parse(&expected, &[]).unwrap(), config, "the run's own config must load back");

    let printed = config.print_with_defaults_marked();
    let unmarked: Vec<_> = printed.lines().filter(|line| line.contains('=') && !line.ends_with("# default")).collect();
    let given = [
        format!("base = \"{dir}/base\""),
        format!("train = [\"{dir}/rows.jsonl\"]"),
        format!("output = \"{dir}/run\""),
    ];
    assert_eq!(unmarked, given);
}

#[test]
fn a_config_with_nothing_at_its_default_survives_the_round_trip() {
    let place = Place::new();
    for file in
        ["tok/tokenizer.model", "adapter/adapter_config.json", "my.toml", "v[1].jsonl", "more/b.json", "more/a.json"]
    {
        place.touch(file);
    }
    let text = place.text(
        "tokenizer = \"DIR/tok/tokenizer.model\"\ndtype = \"bf16\"\ndevice = \"cpu\"\ninit_adapter = \"DIR/adapter\"\n\
         resize_vocab = true\nnew_rows = \"mean\"\nallow_config_keys = [\"logit_scale\"]",
        "r = 7\nalpha = 3\ndropout = 0\ntarget_modules = [\"v_proj\", \"q_proj\"]\n\
         modules_to_save = [\"lm_head\", \"embed_tokens\"]\nuse_rslora = true",
        "validation = [\"DIR/v[1].jsonl\", \"DIR/more/*.json\"]\ntemplate = \"DIR/my.toml\"\nlearn = \"last\"\nmax_length = 100\n\
         truncation = \"cut\"\nspecial_tokens = \"text\"\nshuffle = false\nmax_bad_rows = 5\ncache_dir = \"DIR/cache\"\n\
         cache_max_gb = 7",
        "max_steps = 9\nglobal_batch = 3\nmicro_batch_tokens = 100\nlearning_rate = 1.2345678901234567e-5\n\
         schedule = \"constant\"\nwarmup_steps = 2\nweight_decay = 1\nbetas = [0, 0.5]\neps = 1e-300\n\
         max_grad_norm = 0\n\
         loss_average = \"samples\"\nloss_group_samples = 2\nseed = 0\nrecompute = \"none\"\nshard = true\ndeterministic = true\n\
         non_finite = \"skip\"\nmax_non_finite = 1\n\
         checkpoint_every = 8\n\
         keep_checkpoints = 1\nkeep_best = 2\nkeep_steps = [3]\neval_every = 4\nlog_every = 0\nsave_dtype = \"fp16\"",
    );
    let config = parse(&text, &[]).unwrap();
    assert_eq!(config.lora.target_modules, ["q_proj", "v_proj"], "in the model's order");
    assert_eq!(config.lora.modules_to_save, ["embed_tokens", "lm_head"]);
    assert_eq!(config.lora.alpha, 3.0);
    let names = ["v[1].jsonl", "more/a.json", "more/b.json"];
    assert_eq!(config.data.validation, names.map(|name| place.path(name)), "a glob's files are sorted");
    assert_eq!((config.train.duration(), config.train.warmup()), (Duration::Steps(9), Warmup::Steps(2)));
    assert_eq!(config.train.micro_batch_tokens, Auto::Is(100));

    let again = parse(&config.to_toml(), &[]).unwrap();
    assert_eq!(again, config);
    assert_eq!(again.to_toml(), config.to_toml());
    // Nothing is a default here but the key that two others exclude.
    let marked: Vec<_> = config
        .print_with_defaults_marked()
        .lines()
        .filter(|line| line.ends_with("default"))
        .map(str::to_owned)
        .collect();
    assert_eq!(marked, ["validation_fraction = 0.0  # default"]);
}

#[test]
fn all_faults_come_at_once_each_with_its_place_and_in_the_files_order() {
    let text = "[model]\nbase = \"meta-llama/Llama-2-7b-hf\"\ndtype = \"bfloat16\"\n\
                [lora]\nr = 0\nalpha = \"16\"\ndropout = 1\ntarget_modules = [\"q_proj\", \"q_proj\", \"qkv_proj\"]\n\
                [data]\ncutoff_len = 256\nmax_length = 512.5\nvalidation = [3]\n\
                [train]\nepochs = 1\nmax_steps = 2\nlearning_rate = nan\nbetas = [0.9]\n\
                keep_checkpoints = 0\nshuffle = true\n";
    let all = faults(text, &["train.seed=-1", "train.weight_decay"]);
    let shown: Vec<_> = all.iter().map(|fault| format!("{fault} | {}", fault.hint)).collect();
    let expected = [
        ("c.toml:2: model.base", "no folder", "hf download meta-llama/Llama-2-7b-hf"),
        ("c.toml:3: model.dtype", "\"fp32\", \"bf16\", \"fp16\", found the text \"bfloat16\"", "write \"bf16\""),
        ("c.toml:5: lora.r", "a whole number of at least 1 and at most 65536, found 0", ""),
        ("c.toml:6: lora.alpha", "a number greater than 0, found the text \"16\"", "write 16 without quotes"),
        ("c.toml:7: lora.dropout", "less than 1, found 1", ""),
        ("c.toml:8: lora.target_modules", "\"q_proj\" is named twice", ""),
        ("c.toml:8: lora.target_modules", "found the text \"qkv_proj\"", "\"q_proj\", \"k_proj\", \"v_proj\""),
        ("c.toml:10: data.cutoff_len", "unknown key", "use data.max_length"),
        ("c.toml:11: data.max_length", "a whole number of at least 2 and at most 1048576, found 512.5", ""),
        ("c.toml:12: data.validation", "paths or globs in quotes, found 3", ""),
        ("c.toml:14: train.epochs", "max_steps says the same", "keep one of"),
        ("c.toml:16: train.learning_rate", "greater than 0, found NaN", ""),
        ("c.toml:17: train.betas", "a list of two numbers", ""),
        ("c.toml:18: train.keep_checkpoints", "at least 1 and at most 1048576, found 0", ""),
        ("c.toml:19: train.shuffle", "unknown key", "write shuffle under [data]"),
        ("--set train.weight_decay", "expected section.key=value", "--set train.learning_rate=1e-4"),
        ("c.toml: data.train", "required", "write train = "),
        ("c.toml: train.output", "required", "write output = "),
        ("--set train.seed=-1", "at least 0, found -1", ""),
    ];
    assert_eq!(all.len(), expected.len(), "{shown:#?}");
    for (place, what, hint) in expected {
        let found = all.iter().find(|fault| fault.place == place && fault.what.contains(what));
        let found = found.unwrap_or_else(|| panic!("nothing says {what:?} of {place}: {shown:#?}"));
        holds(found, place, what, hint);
    }
    let lines: Vec<_> = all.iter().filter_map(|fault| fault.place.split(':').nth(1)?.parse::<usize>().ok()).collect();
    assert!(lines.is_sorted() && lines.len() == 15, "{shown:#?}");
}

#[test]
fn names_of_other_trainers_lead_to_ours_wherever_they_stand() {
    let place = Place::new();
    let cases = [
        ("cutoff_len = 1", "data.max_length"),
        ("max_seq_length = 1", "data.max_length"),
        ("sequence_len = 1", "data.max_length"),
        ("model_name_or_path = 1", "model.base"),
        ("base_model = 1", "model.base"),
        ("per_device_train_batch_size = 4", "train.global_batch: it counts the samples of one update over all devices"),
        ("gradient_accumulation_steps = 4", "train.global_batch"),
        ("lora_r = 8", "lora.r"),
        ("lora_rank = 8", "lora.r"),
        ("lora_target_modules = []", "lora.target_modules"),
        ("num_train_epochs = 3", "train.epochs"),
        ("lr = 1e-4", "train.learning_rate"),
        ("lr_scheduler_type = \"cosine\"", "train.schedule"),
        ("optim = \"adamw_torch\"", "the optimizer is always AdamW"),
        ("bf16 = true", "model.dtype: \"bf16\""),
        ("gradient_checkpointing = true", "train.recompute"),
        ("output_dir = \"x\"", "train.output"),
        ("save_steps = 1", "train.checkpoint_every"),
        ("logging_steps = 1", "train.log_every"),
        ("save_total_limit = 1", "train.keep_checkpoints"),
        ("val_set_size = 1", "data.validation_fraction"),
        ("datasets = []", "data.train"),
        ("terminate_on_nan = true", "train.non_finite: \"stop\" or \"skip\""),
        ("logging_nan_inf_filter = false", "always shown"),
        ("resume_from_checkpoint = true", "bellora resume RUN_DIR"),
        ("sample_packing = true", "always packed"),
        ("load_in_4bit = true", "not supported"),
        ("deepspeed = \"x\"", "use train.shard"),
        ("use_dora = true", "not supported"),
        // Ours, in the wrong section or slightly misspelt.
        ("max_length = 1", "write max_length under [data]: data.max_length"),
        ("Learning-Rate = 1", "train.learning_rate"),
        ("modules_to_safe = 1", "did you mean lora.modules_to_save?"),
        ("lerning_rate = 1", "did you mean train.learning_rate?"),
        ("zzzzzz = 1", "[model], [lora], [data] and [train]"),
    ];
    for (line, answer) in cases {
        let name = line.split_once(" =").unwrap().0;
        holds(&fault(&format!("{line}\n{}", place.minimal()), &[]), name, "unknown key outside of any section", answer);
        if name != "max_length" && name != "zzzzzz" {
            holds(&fault(&place.text("", "", line, ""), &[]), &format!("data.{name}"), "unknown key", answer);
        }
        let set = format!("train.{name}=1");
        holds(
            &fault(&place.minimal(), &[&set]),
            &format!("--set {set}"),
            "unknown key",
            if name == "zzzzzz" { "the keys of [train] are" } else { answer },
        );
    }
    // A required key under another name is one fault, not two.
    let renamed = place.minimal().replace("base = ", "model_name_or_path = ").replace("output = ", "output_dir = ");
    let places: Vec<_> = faults(&renamed, &[]).into_iter().map(|fault| fault.place).collect();
    assert_eq!(places, ["c.toml:2: model.model_name_or_path", "c.toml:10: train.output_dir"]);
    // A section under another name is read as the one it stands for.
    let renamed = place.text("", "", "", "seed = -5").replace("[train]", "[training]");
    let all = faults(&renamed, &[]);
    holds(&all[0], "c.toml:9: [training]", "unknown section", "call it [train]");
    holds(&all[1], "train.seed", "found -5", "");
    assert_eq!(all.len(), 2, "{all:#?}");
    holds(&fault(&format!("{}[nproc]\n", place.minimal()), &[]), "[nproc]", "unknown section", "[model], [lora]");
    holds(&faults("model = \"x\"", &[])[0], "c.toml:1: model", "this is a section", "[model]");
}

#[test]
fn other_formats_and_broken_toml_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let Err(Error::Invalid(faults)) = Config::load(&path, &[]) else { panic!("{name} was taken") };
        faults
    };
    holds(&load("a.yaml", "### model\nmodel_name_or_path: x\n")[0], "a.yaml", "this is YAML", "max_length = 512");
    holds(&load("b.toml", "base_model: x\nlora_r: 8\n")[0], "b.toml", "this is YAML", "[data]");
    holds(&load("c.json", "{\"train\": {\"epochs\": 1}}")[0], "c.json", "this is JSON", "[data]");
    let broken = load("d.toml", "[model]\nbase = \"x\"\ndevice = cuda\n[train]\nepochs = \nseed = 1\nseed = 2\n");
    holds(&broken[0], "d.toml:3", "not valid TOML", "in \"quotes\"");
    holds(&broken[1], "d.toml:5", "not valid TOML", "");
    holds(&broken[2], "d.toml:7", "duplicate key", "each section and key once");
    assert_eq!(broken.len(), 3, "{broken:#?}");
    let missing = Config::load(&dir.path().join("none.toml"), &[]).unwrap_err();
    assert_eq!(missing.exit_code(), 2, "a config that is not there is known before any work");
    holds(&missing.faults()[0], "none.toml", "cannot be read", "relative to the working folder");
    holds(&Config::load(dir.path(), &[]).unwrap_err().faults()[0], "", "cannot be read", "this is a folder");
}

#[test]
fn set_overrides_the_file_is_parsed_as_toml_and_replaces_the_other_of_a_pair() {
    let place = Place::new();
    place.touch("7");
    let text = place.text("", "", "validation = \"DIR/rows.jsonl\"", "epochs = 3\nwarmup_ratio = 0.5");
    let out = format!("train.output={}", place.path("2024-01-01").display());
    let seven = format!("data.train=[\"{}\"]", place.path("7").display());
    let sets = [
        "train.max_steps = 5",
        "train.warmup_steps=1",
        "lora.target_modules=[\"q_proj\"]",
        "lora.modules_to_save=lm_head",
        "train.learning_rate=1",
        "train.learning_rate=2",
        "data.validation_fraction=0.25",
        &out,
        &seven,
        "model.dtype=fp16",
    ];
    let config = parse(&text, &sets).unwrap();
    assert_eq!(config.train.duration(), Duration::Steps(5));
    assert_eq!(config.train.warmup(), Warmup::Steps(1));
    assert_eq!(config.lora.target_modules, ["q_proj"]);
    assert_eq!(config.lora.modules_to_save, ["lm_head"]);
    assert_eq!(config.train.learning_rate, 2.0, "the later --set holds");
    assert_eq!((config.data.validation.len(), config.data.validation_fraction), (0, 0.25));
    assert_eq!(config.train.output, place.path("2024-01-01"));
    assert_eq!(config.data.train, [place.path("7")]);
    let back = parse(&config.to_toml(), &["train.epochs=2"]).unwrap();
    assert_eq!(back.train.duration(), Duration::Epochs(2));
    // Text that looks like a number or a date is text where a path is meant.
    let odd = parse(&text, &["train.output=2024-01-01"]).unwrap();
    assert!(odd.train.output.is_absolute() && odd.train.output.ends_with("2024-01-01"), "{odd:?}");
    holds(&fault(&text, &["lora.r=many"]), "--set lora.r=many", "found the text \"many\"", "");
    holds(&fault(&text, &["learning_rate=1"]), "--set learning_rate=1", "unknown key", "train.learning_rate");
    let both = place.text("", "", "validation = \"DIR/rows.jsonl\"\nvalidation_fraction = 0.1", "");
    holds(&fault(&both, &[]), "data.validation_fraction", "held out as well", "keep one");
    let off = place.text("", "", "validation = \"DIR/rows.jsonl\"\nvalidation_fraction = 0", "");
    assert_eq!(parse(&off, &[]).unwrap().data.validation.len(), 1, "a fraction of 0 holds nothing out");
}

#[test]
fn an_evaluation_of_a_run_asks_for_every_file_but_the_training_samples() {
    let place = Place::new();
    std::fs::create_dir(place.path("run")).unwrap();
    let text = place.text("", "", "validation = \"DIR/rows.jsonl\"", "");
    let without = |key: &str| {
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with(key)).collect();
        std::fs::write(place.path("run/config.toml"), lines.join("\n")).unwrap();
        Config::load_run_to_evaluate(&place.path("run"), &[])
    };
    without("train = ").unwrap();
    match without("base = ") {
        Err(Error::Invalid(faults)) => {
            assert_eq!(faults.len(), 1, "{faults:#?}");
            holds(&faults[0], "model.base", "required", "under [model]");
        }
        other => panic!("a config without a base was taken: {other:?}"),
    }
}

#[test]
fn paths_and_values_that_cannot_be_are_refused() {
    let place = Place::new();
    for file in ["model.gguf", "adapter.safetensors", "tok.bin", "dir/x.txt", "taken"] {
        place.touch(file);
    }
    let with = |section: usize, lines: &str| {
        let mut parts = [""; 4];
        parts[section] = lines;
        place.text(parts[0], parts[1], parts[2], parts[3])
    };
    let (model, lora, data, train) = (0, 1, 2, 3);
    let cases = [
        (model, "tokenizer = \"DIR/tok.bin\"", "model.tokenizer", "SentencePiece", "folder"),
        (model, "tokenizer = \"DIR/none\"", "model.tokenizer", "no file or folder", "nothing of that name"),
        (model, "init_adapter = \"DIR/adapter.safetensors\"", "model.init_adapter", "is a file", "adapter_config.json"),
        (model, "init_adapter = \"ziqing/chinese-alpaca\"", "model.init_adapter", "no folder", "hf download"),
        (model, "resize_vocab = true", "model.resize_vocab", "lacks embed_tokens and lm_head", "modules_to_save"),
        (model, "resize_vocab = \"true\"", "model.resize_vocab", "expected true or false", "without quotes"),
        (train, "shard = \"true\"", "train.shard", "expected \"auto\", true or false", "without quotes"),
        (train, "shard = 1", "train.shard", "expected \"auto\", true or false", ""),
        (model, "device = \"cuda:0\"", "model.device", "\"auto\", \"cpu\", \"cuda\"", "write \"cuda\""),
        (lora, "target_modules = []", "lora.target_modules", "empty list", "leave it out"),
        (lora, "target_modules = \"all-linear\"", "lora.target_modules", "all-linear", "leave it out"),
        (lora, "target_modules = [\"lm_head\"]", "lora.target_modules", "lm_head", "modules_to_save"),
        (lora, "target_modules = [\"qproj\"]", "lora.target_modules", "qproj", "did you mean \"q_proj\"?"),
        (lora, "modules_to_save = [\"norm\"]", "lora.modules_to_save", "norm", "norms are not trained"),
        (lora, "alpha = inf", "lora.alpha", "found inf", ""),
        (lora, "r = true", "lora.r", "found true", ""),
        (data, "validation = \"DIR/none.jsonl\"", "data.validation", "no file", "nothing of that name"),
        (data, "validation = \"DIR/*.csv\"", "data.validation", "no file matches", ""),
        (data, "validation = \"DIR/dir\"", "data.validation", "is a folder", "dir/*.jsonl"),
        (data, "validation = \"BelleGroup/train_0.5M_CN\"", "data.validation", "no file", "not downloaded"),
        (data, "template = \"alpacca\"", "data.template", "alpacca", "did you mean \"alpaca\"?"),
        (data, "template = \"DIR/none.toml\"", "data.template", "no file", ""),
        (data, "template = \"chatml\"", "data.template", "chatml", "template file"),
        (data, "template = 3", "data.template", "found 3", ""),
        (data, "validation_fraction = 1.0", "data.validation_fraction", "less than 1", ""),
        (data, "max_length = 99999999999999999999", "data.max_length", "a whole number", ""),
        (train, "micro_batch_tokens = 511", "train.micro_batch_tokens", "data.max_length = 512, found 511", "raise it"),
        (train, "micro_batch_tokens = \"big\"", "train.micro_batch_tokens", "\"auto\" or a whole number", ""),
        (train, "max_steps = -1", "train.max_steps", "at least 1 and at most 1099511627776, found -1", ""),
        (train, "epochs = 0.5", "train.epochs", "whole number", ""),
        (train, "epochs = 2\nmax_steps = 1", "train.epochs", "max_steps", "keep one"),
        (train, "warmup_ratio = 1.5", "train.warmup_ratio", "from 0 to 1", ""),
        (train, "warmup_ratio = 0.1\nwarmup_steps = 1", "train.warmup_ratio", "warmup_steps", "keep one"),
        (train, "betas = [0.9, 1]", "train.betas", "two numbers", ""),
        (train, "schedule = \"constant_with_warmup\"", "train.schedule", "found", "\"constant\""),
        (train, "global_batch = [1]", "train.global_batch", "found a list", ""),
        (train, "seed = 2024-01-01", "train.seed", "found a date", ""),
        (train, "nproc = 2", "train.nproc", "unknown key", ""),
    ];
    for (section, lines, key, what, hint) in cases {
        holds(&fault(&with(section, lines), &[]), key, what, hint);
    }
    // What follows from a fault is not a second one.
    let misspelt = place.text("resize_vocab = true", "modules_to_save = [\"embeddings\"]", "", "");
    holds(&fault(&misspelt, &[]), "lora.modules_to_save", "embeddings", "write \"embed_tokens\"");
    let renamed = place.text("", "", "cutoff_len = 256", "micro_batch_tokens = 300");
    holds(&fault(&renamed, &[]), "data.cutoff_len", "unknown key", "data.max_length");
    let swap = |from: &str, to: &str| place.minimal().replace(from, to);
    holds(&fault(&swap("/base\"", "/model.gguf\""), &[]), "model.base", "is a file", "GGUF");
    holds(&fault(&swap("/run\"", "/taken\""), &[]), "train.output", "taken is a file", "another place");
    holds(&fault(&swap("/run\"", "/taken/run\""), &[]), "train.output", "taken is a file", "another place");
    holds(
        &fault(&place.minimal(), &["data.train=[]"]),
        "--set data.train=[]",
        "at least one file, found an empty list",
        "",
    );
    holds(
        &fault(&place.minimal(), &["train.max_non_finite=0"]),
        "=0",
        "at least 1 and at most 1099511627776, found 0",
        "the default, 10",
    );
    holds(&fault(&place.minimal(), &["train.non_finite=go on"]), "=go on", "\"stop\", \"skip\"", "");
    holds(&fault(&place.minimal(), &["train.output="]), "--set train.output=", "an empty text", "");
    // Whole floats serve as whole numbers, and the other way round.
    let whole = with(train, "epochs = 3.0\nlearning_rate = 1");
    assert_eq!(parse(&whole, &[]).unwrap().train.duration(), Duration::Epochs(3));
}

#[test]
fn differences_are_named_with_what_they_mean_to_the_run() {
    let place = Place::new();
    let run = parse(&place.minimal(), &["train.micro_batch_tokens=4096", "train.shard=true", "model.dtype=fp32"]);
    let run = run.unwrap().values();
    let shown = |sets: &[&str]| -> Vec<String> {
        let config = parse(&place.minimal(), sets).unwrap();
        let differences = config.differences(&run).into_iter();
        differences.map(|d| format!("{:?} {}: {} / {}", d.meaning, d.key, d.ours, d.theirs)).collect()
    };
    // `auto` agrees with what was settled, and 128 is 128.0.
    assert_eq!(shown(&["lora.alpha=128", "train.betas=[0.9, 0.999]", "train.output=elsewhere"]), [""; 0]);
    let expected = [
        "Defines lora.r: 8 / 64",
        "Defines model.dtype: \"bf16\" / \"fp32\"",
        "Free train.log_every: 7 / 1",
        "Length train.max_steps: 5 / not set",
        "Rounding train.micro_batch_tokens: 1024 / 4096",
        "Rounding train.shard: false / true",
        "Length train.epochs: not set / 1",
    ];
    let other = ["train.max_steps=5", "lora.r=8", "model.dtype=bf16", "train.log_every=7"];
    assert_eq!(shown(&[&other[..], &["train.micro_batch_tokens=1024", "train.shard=false"]].concat()), expected);
    assert!(shown(&["data.template=chinese-alpaca"])[0].starts_with("Contents data.template"));

    // What a run settled stays, unless the config says otherwise.
    let mut config = parse(&place.minimal(), &["model.dtype=bf16"]).unwrap();
    config.keep_settled(&run);
    assert_eq!((config.train.micro_batch_tokens, config.train.shard), (Auto::Is(4096), Auto::Is(true)));
    assert_eq!(config.model.dtype, Auto::Is(Dtype::Bf16));
}

#[test]
fn a_runs_values_are_read_without_its_files() {
    let place = Place::new();
    let config = parse(&place.minimal(), &["lora.alpha=16", "train.keep_steps=[5, 2, 5]"]).unwrap();
    let path = std::env::temp_dir().join(format!("bellora-values-{}.toml", std::process::id()));
    std::fs::write(&path, config.to_toml().replace("base = \"", "base = \"/gone")).unwrap();
    let values = values_of(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(values["model.base"].as_str().unwrap().starts_with("/gone"));
    assert_eq!((values["lora.alpha"].as_f64(), &values["train.keep_steps"]), (Some(16.0), &serde_json::json!([2, 5])));
    let differences = config.differences(&values);
    assert_eq!(differences.iter().map(|d| &*d.key).collect::<Vec<_>>(), ["model.base"]);
}

#[test]
fn relative_paths_mean_the_working_folder() {
    // The folder of the tests' process is the package's.
    let text = "[model]\nbase = \"src\"\n[data]\ntrain = \"./Cargo.to?l\"\n[train]\noutput = \"runs/x\"\n";
    let config = parse(text, &[]).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(config.model.base, root.join("src"));
    assert_eq!(config.data.train, [root.join("Cargo.toml")]);
    assert_eq!(config.train.output, root.join("runs/x"));
    assert_eq!(config.lora.target_modules, TARGET_MODULES);
}

#[test]
fn a_glob_takes_what_a_shell_takes_each_file_once_and_says_so() {
    let place = Place::new();
    for file in [
        "data/a.jsonl",
        "data/b.jsonl",
        "data/.c.jsonl",
        "data/.ipynb_checkpoints/a-checkpoint.jsonl",
        "data/sub/d.jsonl",
        "data/sub/.git/e.jsonl",
        "data/sub/deep/f.jsonl",
        "d [1]/g.jsonl",
        "d [1]/h[x].jsonl",
        "x.jsonl",
    ] {
        place.touch(file);
    }
    std::os::unix::fs::symlink(place.path("data"), place.path("linked")).unwrap();
    std::os::unix::fs::symlink(place.path("data"), place.path("data/sub/round")).unwrap();
    let load = |patterns: &str, validation: &str| {
        let text = place.text("", "", &format!("validation = {validation}"), "").replace(
            &format!("train = \"{}/rows.jsonl\"", place.path("").display().to_string().trim_end_matches('/')),
            &format!("train = {}", patterns.replace("DIR", &place.dir.path().display().to_string())),
        );
        let text = text.replace("DIR", &place.dir.path().display().to_string());
        parse(&text, &[])
    };
    let names = |files: &[PathBuf]| -> Vec<String> {
        files.iter().map(|file| file.strip_prefix(place.dir.path()).unwrap().display().to_string()).collect()
    };
    for (patterns, wanted, warning) in [
        ("\"DIR/data/*.jsonl\"", &["data/a.jsonl", "data/b.jsonl"][..], ""),
        ("\"DIR/data/.*.jsonl\"", &["data/.c.jsonl"], ""),
        ("\"DIR/data/.*/*.jsonl\"", &["data/.ipynb_checkpoints/a-checkpoint.jsonl"], ""),
        ("\"DIR/data/?.jsonl\"", &["data/a.jsonl", "data/b.jsonl"], ""),
        ("\"DIR/data/[!a].jsonl\"", &["data/b.jsonl"], ""),
        ("\"DIR/data/sub/deep/**/*.jsonl\"", &["data/sub/deep/f.jsonl"], ""),
        ("\"DIR/data/**/*.jsonl\"", &["data/a.jsonl", "data/b.jsonl", "data/sub/d.jsonl", "data/sub/deep/f.jsonl"], ""),
        ("[\"DIR/data/*.jsonl\", \"DIR/data/a.jsonl\"]", &["data/a.jsonl", "data/b.jsonl"], "data/a.jsonl is named or"),
        ("[\"DIR/data/a.jsonl\", \"DIR/data/../data/a.jsonl\"]", &["data/a.jsonl"], "named or matched twice"),
        (
            "[\"DIR/data/a.jsonl\", \"DIR/linked/*.jsonl\"]",
            &["data/a.jsonl", "linked/b.jsonl"],
            "linked/a.jsonl is named",
        ),
        ("[\"DIR/data/*.jsonl\", \"DIR/linked/*.jsonl\"]", &["data/a.jsonl", "data/b.jsonl"], "and 1 more are named"),
        ("\"DIR/d [1]/*.jsonl\"", &["d [1]/g.jsonl", "d [1]/h[x].jsonl"], ""),
        ("\"DIR/d [1]/h[x].jsonl\"", &["d [1]/h[x].jsonl"], ""),
        ("\"DIR/d [[]1]/h[[]*.jsonl\"", &["d [1]/h[x].jsonl"], ""),
        ("\"DIR/data/*\"", &["data/a.jsonl", "data/b.jsonl"], "data/sub is a folder"),
    ] {
        let config = load(patterns, "[]").unwrap_or_else(|error| panic!("{patterns}: {error}"));
        assert_eq!(names(&config.data.train), wanted, "{patterns}");
        let told = config.warnings.iter().map(|fault| fault.in_one_line()).collect::<Vec<_>>().join("\n");
        assert!(told.contains(warning) && told.is_empty() == warning.is_empty(), "{patterns}: {told}");
        assert!(warning.is_empty() || told.contains("data.train"), "{told}");
    }
    let both = load("\"DIR/data/*.jsonl\"", "[\"DIR/x.jsonl\", \"DIR/linked/b.jsonl\"]").unwrap();
    assert_eq!(both.warnings.len(), 1, "{:?}", both.warnings);
    holds(&both.warnings[0], "data.validation", "linked/b.jsonl is in data.train as well", "validation_fraction");

    std::os::unix::fs::symlink(place.path("gone.jsonl"), place.path("data/sub/z.jsonl")).unwrap();
    for (patterns, what, hint) in [
        ("\"DIR/d [1]/h[y].jsonl\"", "no file matches", "h[[]y].jsonl"),
        ("\"DIR/e[1]*.jsonl\"", "no file matches", "e[[]1]*.jsonl"),
        ("\"DIR/data/*/\"", "stands for folders", "data/*/*.jsonl"),
        ("\"DIR/data/.ipynb*\"", "no file matches", "is matched and is a folder"),
        ("\"DIR/data/[.jsonl\"", "is not a pattern", "[[]"),
        ("\"DIR/data/**/*.jsonl\"", "z.jsonl is matched and cannot be opened", "what it links to"),
        ("\"DIR/data/sub/.git/*.json\"", "no file matches", "names that begin with a dot"),
    ] {
        match load(patterns, "[]") {
            Err(Error::Invalid(faults)) => {
                assert_eq!(faults.len(), 1, "{faults:?}");
                holds(&faults[0], "data.train", what, hint);
            }
            other => panic!("{patterns}: {other:?}"),
        }
    }
}
