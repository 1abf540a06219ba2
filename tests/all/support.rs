//! Small models, samples and runs for the tests of the engine, all made in the process.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bellora::batch::PackedBatch;
use bellora::checkpoint::adapter_file;
use bellora::config::Config;
use bellora::data::build_batches;
use bellora::engine::metrics::StepMetrics;
use bellora::engine::optim::adamw::{AdamW, AdamWConfig};
use bellora::engine::optim::loss_scale::LossScale;
use bellora::engine::state::TrainState;
use bellora::engine::step::Trainer;
use bellora::formats::safetensors_in::TensorFiles;
use bellora::model::arch;
use bellora::model::decoder::Decoder;
use bellora::model::params::{Gradients, ParamBuffer, named_views};
use bellora::model::shape::Projection;
use bellora::ops::cross_entropy::ScaledLoss;
use bellora::ops::dropout::DropoutKey;
use bellora::ops::target::Target;
use bellora::run::setup::{CacheUse, Job, ModelSetup};
use safetensors::Dtype;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// What operations on a tensor are for.
pub(crate) fn target_of(tensor: &Tensor) -> Target {
    Target::new(tensor.device(), tensor.kind())
}

/// Draws that depend on their seed alone: libtorch's generator is shared by all tests of the process.
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number in [0, 1), by SplitMix64.
    pub(crate) fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// A tensor of N(0, `std`²), by Box and Muller.
    pub(crate) fn normal(&mut self, shape: &[i64], std: f64) -> Tensor {
        let n = shape.iter().product::<i64>();
        let values: Vec<f32> = (0..n)
            .map(|_| {
                let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
                (std * radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()) as f32
            })
            .collect();
        Tensor::from_slice(&values).view(shape)
    }
}

/// The shape of a base model. Its tokenizer is the golden one, of 320 tokens.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) hidden: i64,
    pub(crate) intermediate: i64,
    pub(crate) layers: usize,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) head_dim: i64,
    pub(crate) is_tied: bool,
    pub(crate) llama3_rope: bool,
    pub(crate) model_type: &'static str,
    /// `attention_bias` and, where the architecture has it, `mlp_bias`.
    pub(crate) has_biases: bool,
    /// Rows of the tables, at least the tokenizer's.
    pub(crate) vocab_size: i64,
    /// Multiplies the head's weights, and with them the gradients beneath it.
    pub(crate) head_gain: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            hidden: 24,
            intermediate: 40,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            is_tied: false,
            llama3_rope: false,
            model_type: "llama",
            has_biases: false,
            vocab_size: 320,
            head_gain: 1.0,
        }
    }
}

/// A folder with a base model and its tokenizer, samples, and room for runs; it goes when it is dropped.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
    /// The overrides that every config of this folder begins with.
    sets: Vec<String>,
}

impl Lab {
    /// Makes a base of a shape, and 18 samples of 110 to 150 tokens.
    pub(crate) fn new(shape: Shape) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { dir, sets: Vec::new() };
        write_base(&lab.path("base"), shape);
        lab.write_rows("rows.jsonl", &rows(18, 1));
        lab
    }

    /// Makes a job in fp16 whose gradients overflow at the first loss scales and no more after a few halvings: few
    /// label tokens, so that each has a large share, and large weights in the head.
    pub(crate) fn overflowing() -> Self {
        let lab = Self::new(Shape { head_gain: 40.0, ..Shape::default() });
        let rows: Vec<_> = rows(12, 6).into_iter().map(|(instruction, _)| (instruction, "a".to_string())).collect();
        lab.write_rows("rows.jsonl", &rows);
        lab.with(&["model.dtype=fp16"]).with_init_adapter()
    }

    /// Adds overrides that hold for every config of this folder.
    pub(crate) fn with(mut self, sets: &[&str]) -> Self {
        self.sets.extend(sets.iter().map(ToString::to_string));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes samples: instruction and output each.
    pub(crate) fn write_rows(&self, name: &str, rows: &[(String, String)]) -> PathBuf {
        let lines = rows.iter().map(|(i, o)| json!({ "instruction": i, "input": "", "output": o }).to_string() + "\n");
        let path = self.path(name);
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        path
    }

    /// Writes the config that all of this folder's runs share; `--set` does the rest.
    pub(crate) fn config_file(&self) -> PathBuf {
        let path = self.path("config.toml");
        let dir = self.dir.path().display();
        let text = format!(
            r#"
[model]
base = "{dir}/base"
dtype = "fp32"
device = "cpu"
[lora]
r = 4
alpha = 8
dropout = 0.0
[data]
train = ["{dir}/rows.jsonl"]
max_length = 160
shuffle = false
cache_dir = "{dir}/cache"
[train]
output = "{dir}/run"
max_steps = 6
global_batch = 4
micro_batch_tokens = 4096
learning_rate = 0.002
warmup_steps = 1
"#
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    /// This folder's overrides and some more, the later ones of a key replacing earlier ones.
    pub(crate) fn sets(&self, more: &[&str]) -> Vec<String> {
        self.sets.iter().cloned().chain(more.iter().map(ToString::to_string)).collect()
    }

    /// The config with overrides, for use in the process.
    pub(crate) fn config(&self, more: &[&str]) -> Config {
        Config::load(&self.config_file(), &self.sets(more)).unwrap()
    }

    /// Writes an adapter whose `lora_B` is not zero, so that every gradient is alive from the first update, and makes
    /// every config of this folder begin with it.
    pub(crate) fn with_init_adapter(self) -> Self {
        let setup = ModelSetup::inspect(self.config(&[]), 1).unwrap();
        let dir = self.path("init_adapter");
        std::fs::create_dir(&dir).unwrap();
        let mut draws = Draws::new(77);
        let mut named = Vec::new();
        for entry in setup.layout.entries() {
            let std = if entry.name.contains("lora_") { 0.2 } else { 0.08 };
            named.push((entry.name.clone(), draws.normal(&entry.shape, std)));
        }
        std::fs::write(dir.join(adapter_file::CONFIG_FILE), setup.adapter_config().to_json()).unwrap();
        write_tensors(&dir.join(adapter_file::WEIGHTS_FILE), &named);
        let set = format!("model.init_adapter={}", dir.display());
        self.with(&[&set])
    }

    /// Runs `bellora COMMAND config.toml --set ...` in a process of its own.
    pub(crate) fn run(&self, command: &str, arguments: &[&str], more: &[&str]) -> Ran {
        run(&mut self.command(command, arguments, more))
    }

    pub(crate) fn command(&self, command: &str, arguments: &[&str], more: &[&str]) -> Command {
        let mut process = bellora();
        process.arg(command).arg(self.config_file()).args(arguments);
        for set in self.sets(more) {
            process.args(["--set", &set]);
        }
        process
    }
}

/// The program under test on one thread, so that sums have one order.
pub(crate) fn bellora() -> Command {
    let mut process = Command::new(env!("CARGO_BIN_EXE_bellora"));
    process.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    process
}

/// How a process ended and what it said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Ran {
    /// The same, of a process that is expected to end well.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }
}

pub(crate) fn run(process: &mut Command) -> Ran {
    process.output().unwrap().into()
}

/// The lines of a run's `metrics.jsonl`.
pub(crate) fn metrics(run_dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Samples of common words; with the template they have 110 to 150 tokens, of which 20 to 60 are learned.
pub(crate) fn rows(n: usize, seed: u64) -> Vec<(String, String)> {
    let mut draws = Draws::new(seed);
    let words = ["the", "river", "去年", "name", "of", "秋天", "blue", "写", "stone", "你好", "and", "seven", "，"];
    let mut text = |at_least: usize, spread: usize| {
        let mut text = String::new();
        let until = at_least + draws.below(spread);
        while text.len() < until {
            text.push_str(words[draws.below(words.len())]);
            text.push(' ');
        }
        text
    };
    (0..n).map(|_| (text(4, 24), text(20, 50))).collect()
}

fn write_base(dir: &Path, shape: Shape) {
    std::fs::create_dir(dir).unwrap();
    let mut config = json!({
        "model_type": shape.model_type,
        "attention_bias": shape.has_biases,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.is_tied,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
    });
    if shape.model_type == "llama" {
        config["mlp_bias"] = json!(shape.has_biases);
    }
    if shape.llama3_rope {
        // So short an original context that all three branches of the rule occur among the few frequencies.
        config["rope_scaling"] = json!({
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tokenizer = golden_dir().join("attention_rslora_uneven/tokenizer");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tokenizer.join(name), dir.join(name)).unwrap();
    }

    let llama = arch::load(dir, &[]).unwrap().config;
    let mut draws = Draws::new(5);
    let mut tensors =
        vec![("model.embed_tokens.weight".to_string(), draws.normal(&[shape.vocab_size, shape.hidden], 0.3))];
    for layer in 0..shape.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            let weight = draws.normal(&[shape.hidden], 0.2) + 1.0;
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), weight));
        }
        for projection in Projection::ALL {
            let [rows, columns] = projection.shape(&llama);
            let weight = draws.normal(&[rows, columns], 1.0 / (columns as f64).sqrt());
            tensors.push((format!("{}.weight", projection.module(layer)), weight));
        }
    }
    tensors.push(("model.norm.weight".to_string(), draws.normal(&[shape.hidden], 0.2) + 1.0));
    if !shape.is_tied {
        let std = 0.1 * shape.head_gain;
        tensors.push(("lm_head.weight".to_string(), draws.normal(&[shape.vocab_size, shape.hidden], std)));
    }
    // What some architectures have beside these.
    let names: BTreeSet<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
    for (name, dims) in llama.tensors().into_iter().filter(|(name, _)| !names.contains(name)) {
        let mean = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        tensors.push((name, draws.normal(&dims, 0.2) + mean));
    }
    write_tensors(&dir.join("model.safetensors"), &tensors);
}

/// Writes a safetensors file in fp32.
pub(crate) fn write_tensors(path: &Path, named: &[(String, Tensor)]) {
    adapter_file::write_tensors(std::fs::File::create(path).unwrap(), path, named, Dtype::F32).unwrap();
}

/// The folder of the golden cases.
pub(crate) fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A trainer with the job that it is for.
pub(crate) struct Rig {
    pub(crate) job: Job,
    trainer: Trainer,
}

impl Rig {
    /// Does one step, whose outcome is known at once on a CPU.
    pub(crate) fn step(&mut self) -> bellora::error::Result<StepMetrics> {
        self.trainer.step().map(|metrics| metrics.expect("a CPU keeps nobody waiting"))
    }
}

impl Deref for Rig {
    type Target = Trainer;

    fn deref(&self) -> &Trainer {
        &self.trainer
    }
}

impl DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut Trainer {
        &mut self.trainer
    }
}

/// A trainer before its first step.
pub(crate) fn trainer(config: Config) -> Rig {
    trainer_at(config, |_| {})
}

/// The trainer of one of several ranks, which are to meet yet, before its first step.
pub(crate) fn trainer_of_rank(config: Config, rank: usize, n_ranks: usize) -> Rig {
    trainer_of(config, rank, n_ranks, |_| {})
}

/// A trainer in a state of its own.
///
/// On one thread: sums have one order then, and models this small are ten times quicker than on threads that wait for
/// each other.
pub(crate) fn trainer_at(config: Config, change: impl FnOnce(&mut TrainState)) -> Rig {
    trainer_of(config, 0, 1, change)
}

fn trainer_of(config: Config, rank: usize, n_ranks: usize, change: impl FnOnce(&mut TrainState)) -> Rig {
    tch::set_num_threads(1);
    let job = Job::inspect(config, CacheUse::Off, n_ranks).unwrap();
    let mut params = job.model.initial_params().unwrap();
    let settings = &job.model.config.train;
    let adamw = AdamWConfig { betas: settings.betas, eps: settings.eps, weight_decay: settings.weight_decay };
    let mut optimizer = AdamW::new(adamw, &params).unwrap();
    if job.model.shards() {
        let shard = params.layout().shard(rank, n_ranks);
        optimizer.keep(&shard).unwrap();
        params.keep(shard).unwrap();
    }
    // A sample that is too long would go missing unawares.
    assert_eq!(job.train.stats().dropped, 0);
    let mut state = TrainState::start(LossScale::of(job.model.kind()));
    change(&mut state);
    let model = job.model.load(&params).unwrap();
    let trainer = Trainer::new(job.step_settings(), job.train.clone(), model, params, optimizer, state).unwrap();
    Rig { job, trainer }
}

/// Tensors by name, in the order of a flat buffer.
pub(crate) type Named = Vec<(String, Tensor)>;

/// The loss of an update over `samples` and the gradients of all trained tensors, none of them applied.
///
/// With `micro_batch_tokens` of 1 every document is alone.
pub(crate) fn gradients(
    trainer: &Rig,
    samples: &[u32],
    micro_batch_tokens: usize,
    recompute: bool,
    dropout: Option<DropoutKey>,
) -> (f64, Named) {
    let (job, model) = (&trainer.job, &trainer.model);
    let layout = trainer.params.layout();
    let grads = Gradients::new(layout, Device::Cpu).unwrap();
    let loss = ScaledLoss::new(1.0, Device::Cpu).unwrap();
    for packed in build_batches(&job.train, samples, job.model.loss_average(), micro_batch_tokens) {
        let batch = model.batch(&packed, dropout).unwrap();
        let (hidden_nd, saved) = model.forward(&batch, recompute).unwrap();
        let dhidden_nd = model.head_loss(&hidden_nd, &batch, &grads, &loss).unwrap();
        model.backward(saved, dhidden_nd, &batch, &grads, &mut |_| Ok(())).unwrap();
    }
    (loss.value().unwrap().double_value(&[]), named_views(layout, grads.flat()).unwrap())
}

/// The logits `[N, V]` that a model gives for one document.
pub(crate) fn logits(model: &Decoder, ids: &[i64]) -> Tensor {
    let packed = PackedBatch {
        input_ids: ids.to_vec(),
        position_ids: (0..ids.len() as i64).collect(),
        cu_seqlens: vec![0, ids.len()],
        slots: vec![0],
        ..PackedBatch::with_capacity(0, 0)
    };
    let hidden_nd = model.hidden(&model.batch(&packed, None).unwrap()).unwrap();
    model.logits(&hidden_nd).unwrap()
}

/// Copies of the parameters by name.
pub(crate) fn snapshot(params: &ParamBuffer) -> Named {
    params.named().unwrap().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

/// All tensors of a safetensors file, in fp32.
pub(crate) fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let files = TensorFiles::open(&[path.to_path_buf()]).unwrap();
    let load = |name: &String| (name.clone(), files.load(name, Kind::Float, Device::Cpu).unwrap());
    files.tensors().keys().map(load).collect()
}

/// Compares tensors by name, each within `bound` of the largest element of the judge's; prints and gives the largest
/// difference in that measure.
#[track_caller]
pub(crate) fn assert_tensors_close(
    what: &str,
    ours: &[(String, Tensor)],
    judge: &BTreeMap<String, Tensor>,
    bound: f64,
) -> f64 {
    let names = |it: &mut dyn Iterator<Item = &String>| it.cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&mut ours.iter().map(|(n, _)| n)), names(&mut judge.keys()), "{what}: names");
    let mut worst = (0.0, String::new());
    for (name, tensor) in ours {
        let judge = judge[name].to_kind(Kind::Double);
        assert_eq!(tensor.size(), judge.size(), "{what}: {name}: shape");
        let difference = (tensor.to_kind(Kind::Double) - &judge).abs();
        let (largest, at) = (difference.max().double_value(&[]), difference.argmax(None, false).int64_value(&[]));
        let scale = judge.abs().max().double_value(&[]);
        // Also false for NaN.
        let fits = largest <= bound * scale;
        assert!(
            fits,
            "{what}: {name}: differs by {largest:.3e} at flat index {at}, where the judge's largest is {scale:.3e}"
        );
        if scale > 0.0 && largest / scale >= worst.0 {
            worst = (largest / scale, format!("{name} at flat index {at}"));
        }
    }
    println!(
        "{what}: largest difference {:.1e} of the tensor's largest element, {} (bound {bound:.0e})",
        worst.0, worst.1
    );
    worst.0
}

/// The L2 distance of two sets of tensors as a share of the way from a third, the start, to the second.
pub(crate) fn distance_of_update(
    ours: &Named,
    judge: &BTreeMap<String, Tensor>,
    start: &BTreeMap<String, Tensor>,
) -> f64 {
    assert_eq!(ours.len(), judge.len());
    let squares = |a: &Tensor, b: &Tensor| {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).square().sum(Kind::Double).double_value(&[])
    };
    let off: f64 = ours.iter().map(|(name, tensor)| squares(tensor, &judge[name])).sum();
    let way: f64 = ours.iter().map(|(name, _)| squares(&start[name], &judge[name])).sum();
    (off / way).sqrt()
}
