//! Small jobs number for number against Transformers + PEFT; `tests/golden/README.md` says what each case is for.
//!
//! Both programs compute in fp32 and differ by the order of their sums. That moves a loss near 6 by a few of its last
//! bits (5e-7 each) and a norm likewise; Adam divides by the root of the second moment, which magnifies the rounding of
//! the smallest gradients, so adapters are judged by the L2 length of the difference against that of the whole update.
//! The bounds leave ten to a hundred times what is seen (8e-7, 3e-7, 1e-6 of the update), and a wrong term is far beyond
//! them: leaving out the scale of an adapter or one token's label changes a loss in its third digit.
//!
//! One case is computed in fp16 by both, whose numbers have eleven bits, and the programs round at different places; see
//! [`FP16`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellora::checkpoint::adapter_file::WEIGHTS_FILE;
use bellora::config::{Auto, Config, Dtype, Recompute};
use bellora::engine::metrics::StepMetrics;
use bellora::eval::evaluate;
use bellora::formats::safetensors_in::TensorFiles;
use bellora::run::setup::{CacheUse, Job};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::support::{
    Named, Rig, assert_tensors_close, bellora, distance_of_update, golden_dir, gradients, logits, metrics,
    read_tensors, run, snapshot, trainer,
};

/// How far a run may be from its case: a loss as it is, a gradient norm as a share of itself, an adapter as a share of the
/// whole update.
struct Bounds {
    loss: f64,
    grad_norm: f64,
    update: f64,
}

const FP32: Bounds = Bounds { loss: 1e-5, grad_norm: 2e-5, update: 1e-4 };
/// A rounding is off by 2.5e-4 of a number on average, so a logit near 8 by 2e-3, of which a mean over an update's tokens
/// leaves a part; a norm likewise; Adam makes a full step of a gradient whose sign is rounding's. The bounds are about
/// four times what is seen. Half-precision masters, a forgotten loss scale, a schedule or an Adam that moves with
/// skipped updates are all beyond them.
const FP16: Bounds = Bounds { loss: 6e-3, grad_norm: 1e-3, update: 5e-3 };
/// Learning rates are computed in fp64 on both sides.
const LR_BOUND: f64 = 1e-6;
/// Gradients and logits pass through one forward and backward only: rounding alone, in units of the tensor's largest
/// element (1e-6 is seen).
const TENSOR_BOUND: f64 = 2e-5;

struct Case {
    name: String,
    dir: PathBuf,
    out: tempfile::TempDir,
    expected: Value,
}

fn cases() -> Vec<Case> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(golden_dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.retain(|dir| dir.join("config.toml").is_file());
    dirs.sort();
    assert!(!dirs.is_empty(), "no golden cases in {}", golden_dir().display());
    let case = |dir: PathBuf| Case {
        name: dir.file_name().unwrap().to_string_lossy().into_owned(),
        expected: serde_json::from_str(&std::fs::read_to_string(dir.join("expected/steps.json")).unwrap()).unwrap(),
        dir,
        out: tempfile::tempdir().unwrap(),
    };
    dirs.into_iter().map(case).collect()
}

impl Case {
    fn config_text(&self) -> String {
        let text = std::fs::read_to_string(self.dir.join("config.toml")).unwrap();
        let run = self.out.path().join("run");
        text.replace("{case}", &self.dir.display().to_string()).replace("{out}", &run.display().to_string())
    }

    fn cache(&self) -> String {
        format!("data.cache_dir={}", self.out.path().join("cache").display())
    }

    fn config(&self) -> Config {
        Config::parse(&self.config_text(), &self.name, &[self.cache()]).unwrap()
    }

    fn steps(&self) -> &[Value] {
        self.expected["steps"].as_array().unwrap()
    }

    fn tensors(&self, name: &str) -> BTreeMap<String, Tensor> {
        read_tensors(&self.dir.join(name))
    }

    fn init(&self) -> BTreeMap<String, Tensor> {
        self.tensors("init_adapter/adapter_model.safetensors")
    }

    fn adapter(&self) -> BTreeMap<String, Tensor> {
        self.tensors("expected/adapter/adapter_model.safetensors")
    }

    fn has(&self, name: &str) -> bool {
        self.dir.join(name).is_file()
    }

    fn bounds(&self) -> &'static Bounds {
        if self.config().model.dtype == Auto::Is(Dtype::Fp16) { &FP16 } else { &FP32 }
    }
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value} is no number"))
}

/// A step as one of the programs did it.
struct Step {
    loss: f64,
    /// `None` where it overflowed.
    grad_norm: Option<f64>,
    lr: f64,
    loss_scale: f64,
    skipped: bool,
}

/// Largest differences met in one comparison of runs.
#[derive(Default)]
struct Seen {
    loss: f64,
    grad_norm: f64,
    lr: f64,
}

impl Seen {
    #[track_caller]
    fn compare(&mut self, what: &str, bounds: &Bounds, expected: &Value, ours: &Step) {
        let step = &expected["step"];
        // Cases in fp32 have neither.
        let skipped = expected["skipped"].as_bool().unwrap_or(false);
        let loss_scale = expected["loss_scale"].as_f64().unwrap_or(1.0);
        assert_eq!((ours.skipped, ours.loss_scale), (skipped, loss_scale), "{what}: step {step}");
        let off = |seen: &mut f64, name: &str, ours: f64, judge: f64, scale: f64, bound: f64| {
            let difference = (ours - judge).abs() / scale;
            assert!(
                difference <= bound,
                "{what}: step {step}: {name} {ours}, expected {judge}: off by {difference:.1e}"
            );
            *seen = seen.max(difference);
        };
        off(&mut self.loss, "loss", ours.loss, number(expected, "loss"), 1.0, bounds.loss);
        match (ours.grad_norm, expected["grad_norm"].as_f64()) {
            (Some(norm), Some(judge)) => off(&mut self.grad_norm, "grad_norm", norm, judge, judge, bounds.grad_norm),
            (ours, judge) => assert_eq!(ours, judge, "{what}: step {step}: grad_norm"),
        }
        let judge = number(expected, "lr");
        off(&mut self.lr, "lr", ours.lr, judge, judge.max(f64::MIN_POSITIVE), LR_BOUND);
    }

    fn print(&self, what: &str, update: f64, eval: f64) {
        println!(
            "{what}: largest differences: loss {:.1e}, grad norm {:.1e}, lr {:.1e}, adapter {update:.1e} of the update, eval loss {eval:.1e}",
            self.loss, self.grad_norm, self.lr
        );
    }
}

#[track_caller]
fn assert_update(what: &str, ours: &Named, case: &Case) -> f64 {
    let off = distance_of_update(ours, &case.adapter(), &case.init());
    assert!(off <= case.bounds().update, "{what}: the final adapter is off by {off:.1e} of the update");
    off
}

/// Trains a case in this process, holding every step against the case.
fn train(case: &Case, variant: &str, change: impl FnOnce(&mut Config)) -> Rig {
    let what = format!("{} ({variant})", case.name);
    let mut config = case.config();
    change(&mut config);
    let mut trainer = trainer(config);
    assert_eq!(trainer.job.total_steps, case.steps().len() as u64, "{what}: updates");
    let mut seen = Seen::default();
    for expected in case.steps() {
        let StepMetrics { step, loss, grad_norm, lr, loss_scale, skipped, .. } = trainer.step().unwrap();
        assert_eq!(Some(step), expected["step"].as_u64(), "{what}");
        let grad_norm = grad_norm.filter(|norm| norm.is_finite());
        let ours = Step { loss: loss.unwrap(), grad_norm, lr, loss_scale, skipped };
        seen.compare(&what, case.bounds(), expected, &ours);
    }
    let update = assert_update(&what, &snapshot(&trainer.params), case);
    let validation = trainer.job.validation.as_ref().unwrap();
    let ours = evaluate(
        &trainer.model,
        validation,
        trainer.job.model.micro_batch_tokens(),
        &mut bellora::comm::Solo,
        &Default::default(),
    )
    .unwrap();
    let eval = (ours.eval_loss - number(&case.expected, "eval_loss")).abs();
    assert!(eval <= case.bounds().loss, "{what}: eval loss {} is off by {eval:.1e}", ours.eval_loss);
    seen.print(&what, update, eval);
    trainer
}

#[test]
fn losses_norms_rates_and_adapters_however_the_work_is_cut() {
    for case in cases() {
        train(&case, "default", |_| {});
        // Samples of the cases have 60 to 200 tokens: here two or three of them go together.
        train(&case, "small micro-batches", |c| c.train.micro_batch_tokens = Auto::Is(400));
        train(&case, "one sample at a time", |c| c.train.micro_batch_tokens = Auto::Is(1));
        train(&case, "recompute", |c| {
            c.train.micro_batch_tokens = Auto::Is(400);
            c.train.recompute = Auto::Is(Recompute::All);
        });
    }
}

#[test]
fn tokens_and_labels_of_every_row() {
    for case in cases() {
        let job = Job::inspect(case.config(), CacheUse::Off, 1).unwrap();
        let mut dump = Vec::new();
        job.train.write_dump(&mut dump).unwrap();
        let expected = std::fs::read_to_string(case.dir.join("expected/tokens.jsonl")).unwrap();
        let parsed = |text: &str| -> Vec<Value> { text.lines().map(|l| serde_json::from_str(l).unwrap()).collect() };
        let (ours, judge) = (parsed(std::str::from_utf8(&dump).unwrap()), parsed(&expected));
        for (row, (ours, judge)) in ours.iter().zip(&judge).enumerate() {
            assert_eq!(ours, judge, "{}: row {}", case.name, row + 1);
        }
        assert_eq!(ours.len(), judge.len(), "{}: rows", case.name);
    }
}

#[test]
fn gradients_of_the_first_update_by_name() {
    let mut n_cases = 0;
    for case in cases().iter().filter(|case| case.has("expected/gradients.safetensors")) {
        let judge = case.tensors("expected/gradients.safetensors");
        let trainer = trainer(case.config());
        let samples: Vec<u32> = (0..trainer.job.model.config.train.global_batch as u32).collect();
        for (variant, micro_batch_tokens) in [("packed", 4096), ("each sample alone", 1)] {
            let (_, ours) = gradients(&trainer, &samples, micro_batch_tokens, false, None);
            assert_tensors_close(&format!("{} ({variant}): gradients", case.name), &ours, &judge, TENSOR_BOUND);
        }
        n_cases += 1;
    }
    assert!(n_cases >= 2, "{n_cases} cases have gradients");
}

#[test]
fn logits_of_the_forward_pass_and_token_by_token() {
    let mut n_cases = 0;
    for case in cases().iter().filter(|case| case.has("expected/logits.safetensors")) {
        let path = case.dir.join("expected/logits.safetensors");
        let file = TensorFiles::open(&[path]).unwrap();
        let ids: Vec<i64> = file.bytes("input_ids").unwrap().chunks(4).map(|b| read_i32(b).into()).collect();
        let shape: Vec<i64> = file.tensors()["logits"].shape.iter().map(|&n| n as i64).collect();
        let expected_nv = Tensor::empty(shape, (Kind::Float, Device::Cpu));
        file.copy_into("logits", &expected_nv).unwrap();
        let judge = |rows: Tensor| BTreeMap::from([("logits".to_string(), rows)]);
        let trainer = trainer(case.config());
        let ours = vec![("logits".to_string(), logits(&trainer.model, &ids))];
        let all = judge(expected_nv.shallow_clone());
        assert_tensors_close(&format!("{}: forward", case.name), &ours, &all, TENSOR_BOUND);

        // A prompt of all but five tokens, then one at a time over the cache.
        let mut cache = trainer.model.new_cache(ids.len() as i64).unwrap();
        let n_prompt = ids.len() - 5;
        for last in n_prompt - 1..ids.len() {
            let new = if last + 1 == n_prompt { &ids[..n_prompt] } else { &ids[last..=last] };
            let row = trainer.model.decode(new, &mut cache).unwrap();
            let what = format!("{}: decode, row {last}", case.name);
            let row = vec![("logits".to_string(), row)];
            assert_tensors_close(&what, &row, &judge(expected_nv.get(last as i64)), TENSOR_BOUND);
        }
        n_cases += 1;
    }
    assert!(n_cases >= 1, "no case has logits");
}

fn read_i32(bytes: &[u8]) -> i32 {
    i32::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn greedy_tokens_of_the_trained_model() {
    let ids = |value: &Value| -> Vec<i64> { value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect() };
    let mut n_cases = 0;
    for case in cases().iter().filter(|case| case.expected.get("greedy").is_some()) {
        let greedy = &case.expected["greedy"];
        let trainer = train(case, "before generating", |_| {});
        let mut next = ids(&greedy["prompt_ids"]);
        let expected = ids(&greedy["ids"]);
        let mut cache = trainer.model.new_cache((next.len() + expected.len()) as i64).unwrap();
        let mut ours: Vec<i64> = Vec::new();
        for _ in 0..expected.len() {
            let logits = trainer.model.decode(&next, &mut cache).unwrap();
            next = vec![logits.argmax(-1, false).int64_value(&[])];
            ours.extend(&next);
        }
        assert_eq!(ours, expected, "{}", case.name);
        n_cases += 1;
    }
    assert!(n_cases >= 1, "no case has greedy tokens");
}

/// The weights of a model directory.
fn model_tensors(dir: &Path) -> Named {
    read_tensors(&dir.join("model.safetensors")).into_iter().collect()
}

#[test]
fn merged_weights_of_the_golden_adapter() {
    let mut n_cases = 0;
    for case in cases().iter().filter(|case| case.has("expected/merged.safetensors")) {
        let adapter = case.out.path().join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        for folder in ["expected/adapter", "tokenizer"] {
            for file in std::fs::read_dir(case.dir.join(folder)).unwrap().map(Result::unwrap) {
                std::fs::copy(file.path(), adapter.join(file.file_name())).unwrap();
            }
        }
        let out = case.out.path().join("merged");
        let mut export = bellora();
        export.arg("export").arg(&adapter).args(["--format", "merged", "--out"]).arg(&out);
        run(export.arg("--base").arg(case.dir.join("base"))).ok();
        // One product and one sum in fp32 on both sides.
        let judge = case.tensors("expected/merged.safetensors");
        assert_tensors_close(&format!("{}: merged", case.name), &model_tensors(&out), &judge, 1e-6);
        n_cases += 1;
    }
    assert!(n_cases >= 2, "{n_cases} cases have merged weights");
}

#[test]
fn the_program_itself_trains_and_exports_the_cases() {
    for case in cases() {
        let config = case.out.path().join("config.toml");
        std::fs::write(&config, case.config_text()).unwrap();
        run(bellora().arg("train").arg(&config).args(["--set", &case.cache()])).ok();
        let run_dir = case.out.path().join("run");

        let what = format!("{} (bellora train)", case.name);
        let lines = metrics(&run_dir);
        let steps: Vec<_> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
        assert_eq!(steps.len(), case.steps().len(), "{what}: lines of metrics.jsonl with a loss");
        let mut seen = Seen::default();
        for (ours, expected) in steps.iter().zip(case.steps()) {
            assert_eq!(ours["step"], expected["step"], "{what}");
            let [loss, lr, loss_scale] = ["loss", "lr", "loss_scale"].map(|key| number(ours, key));
            let (grad_norm, skipped) = (ours["grad_norm"].as_f64(), ours["skipped"].as_bool().unwrap());
            seen.compare(&what, case.bounds(), expected, &Step { loss, grad_norm, lr, loss_scale, skipped });
        }
        let last = lines.last().unwrap();
        let eval = (number(last, "eval_loss") - number(&case.expected, "eval_loss")).abs();
        assert!(eval <= case.bounds().loss, "{what}: {last}: off by {eval:.1e}");
        let adapter: Named = read_tensors(&run_dir.join("adapter").join(WEIGHTS_FILE)).into_iter().collect();
        seen.print(&what, assert_update(&what, &adapter, &case), eval);
        assert_same_adapter_config(&run_dir.join("adapter"), &case.dir.join("expected/adapter"));

        if case.has("expected/merged.safetensors") {
            let out = case.out.path().join("merged");
            run(bellora().arg("export").arg(&run_dir).args(["--format", "merged", "--out"]).arg(&out)).ok();
            // Here the adapters differ too, as much as the bound on an update lets them.
            let judge = case.tensors("expected/merged.safetensors");
            assert_tensors_close(&format!("{what}: merged"), &model_tensors(&out), &judge, 2e-5);
        }
    }
}

/// Compares what PEFT reads of an adapter's configuration with what PEFT wrote itself.
#[track_caller]
fn assert_same_adapter_config(ours: &Path, judge: &Path) {
    let read = |dir: &Path| -> Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join("adapter_config.json")).unwrap()).unwrap()
    };
    let names = |value: &Value| {
        let mut names: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        names.sort_unstable();
        names.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let (ours, judge) = (read(ours), read(judge));
    for key in ["peft_type", "task_type", "r", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "inference_mode"] {
        assert_eq!(ours[key], judge[key], "{key}");
    }
    for key in ["lora_alpha", "lora_dropout"] {
        assert_eq!(ours[key].as_f64(), judge[key].as_f64(), "{key}");
    }
    for key in ["target_modules", "modules_to_save"] {
        assert_eq!(names(&ours[key]), names(&judge[key]), "{key}");
    }
}
