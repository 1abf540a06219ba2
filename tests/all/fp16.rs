//! Overflow in fp16, injected at every kind of place where it can happen.
//!
//! Every model here has a channel that is silent: no weight writes to it or reads from it, and no embedding has anything
//! there but that of the token `~`. A place is made to overflow by a large weight on that channel, so that it does so
//! in the micro-batches that hold a `~` and in no others. The tests look at which numbers overflow, and do so with loss
//! scales a few times smaller (where an overflow is wanted) and larger (where none is) than those of the run.
//!
//! The gradients of weights are rounded to fp16 on a CPU alone; on a GPU their products come out in fp32.

use std::collections::{BTreeMap, BTreeSet};

use bellora::batch::PackedBatch;
use bellora::checkpoint::adapter_file::WEIGHTS_FILE;
use bellora::data::build_batches;
use bellora::engine::metrics::StepMetrics;
use bellora::engine::optim::loss_scale::LossScale;
use bellora::error::Error;
use bellora::model::params::{Gradients, lora_key, named_views};
use bellora::model::shape::Projection;
use bellora::ops::cross_entropy::ScaledLoss;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::resume::straight_equals_resumed;
use crate::support::{
    Lab, Named, Rig, Shape, golden_dir, metrics, read_tensors, rows, snapshot, trainer, trainer_at, write_tensors,
};

/// The silent channel of the residual stream, and a feature of the MLP that it alone may reach.
const CHANNEL: i64 = 5;
const FEATURE: i64 = 7;
/// What a `~` has on the silent channel: well above the others together, so that after a norm it has between 4 and
/// `sqrt(24)` there.
const LOUDNESS: f64 = 8.0;
/// A token that no sample holds.
const UNLIKELY: i64 = 9;
/// Blocks of the models; the last one is what most places are in.
const LAYERS: usize = 2;
const LAST: usize = LAYERS - 1;
/// Samples of an update, each a micro-batch of its own: first the longest, last the shortest.
const GLOBAL_BATCH: usize = 3;
const STEPS: u64 = 6;
/// The steps that hold a `~`, and in which micro-batch. Two of them adjoin.
const OVERFLOWS: [(u64, usize); 3] = [(2, 0), (3, 2), (5, 1)];

/// The weights that a place changes.
struct Weights {
    base: BTreeMap<String, Tensor>,
    adapter: BTreeMap<String, Tensor>,
    /// The id of `~`.
    token: i64,
}

/// Sets rows, columns or single elements of a matrix or vector.
fn set(tensor: &Tensor, row: Option<i64>, column: Option<i64>, value: f64) {
    let rows = row.map_or_else(|| tensor.shallow_clone(), |row| tensor.narrow(0, row, 1));
    let _ = column.map_or_else(|| rows.shallow_clone(), |column| rows.narrow(1, column, 1)).fill_(value);
}

impl Weights {
    fn projection(&self, projection: Projection, layer: usize) -> &Tensor {
        &self.base[&format!("{}.weight", projection.module(layer))]
    }

    fn lora(&self, projection: Projection, layer: usize, matrix: &str) -> &Tensor {
        &self.adapter[&lora_key(projection, layer, matrix)]
    }

    fn norm(&self, name: &str) -> &Tensor {
        &self.base[&format!("model.{name}.weight")]
    }

    /// A table where it is trained and where it is frozen.
    fn tables(&self, name: &str) -> Vec<&Tensor> {
        let both = [&self.base, &self.adapter].into_iter().flatten();
        both.filter(|(key, _)| key.contains(name)).map(|(_, tensor)| tensor).collect()
    }

    fn set_table(&self, name: &str, row: Option<i64>, column: Option<i64>, value: f64) {
        self.tables(name).into_iter().for_each(|table| set(table, row, column, value));
    }

    /// Silences the channel and the feature, and gives `~` its embedding.
    fn silence(&self) {
        self.set_table("embed_tokens", None, Some(CHANNEL), 0.0);
        self.set_table("embed_tokens", Some(self.token), None, 0.0);
        self.set_table("embed_tokens", Some(self.token), Some(CHANNEL), LOUDNESS);
        self.set_table("lm_head", None, Some(CHANNEL), 0.0);
        for layer in 0..LAYERS {
            for name in ["input_layernorm", "post_attention_layernorm"] {
                set(self.norm(&format!("layers.{layer}.{name}")), Some(CHANNEL), None, 1.0);
            }
            for projection in Projection::ALL {
                let (weight, b) = (self.projection(projection, layer), self.lora(projection, layer, "lora_B"));
                match projection {
                    Projection::O | Projection::Down => {
                        set(weight, Some(CHANNEL), None, 0.0);
                        set(b, Some(CHANNEL), None, 0.0);
                    }
                    _ => {
                        set(weight, None, Some(CHANNEL), 0.0);
                        set(self.lora(projection, layer, "lora_A"), None, Some(CHANNEL), 0.0);
                    }
                }
                if let Projection::Gate | Projection::Up = projection {
                    set(weight, Some(FEATURE), None, 0.0);
                    set(b, Some(FEATURE), None, 0.0);
                }
            }
        }
        set(self.norm("norm"), Some(CHANNEL), None, 1.0);
    }
}

/// What overflows at a place, and so is not finite.
enum Overflow {
    /// Some of the last block's outputs, and with them the loss: of the rows of `~` on the silent channel, in all
    /// channels, or of other rows of the same document too.
    Channel,
    Rows,
    Document,
    /// The loss alone of what the forward pass computes.
    Logits,
    /// The gradients whose names this finds, no others, and not the loss.
    Gradients(fn(&str) -> bool),
}

struct Place {
    name: &'static str,
    make: fn(&Weights),
    overflow: Overflow,
}

/// Whether a trained tensor gets its gradient through the gate of the last block's MLP.
fn is_beneath_the_last_gate(name: &str) -> bool {
    let beside = ["lm_head", &format!("layers.{LAST}.mlp.down_proj"), &format!("layers.{LAST}.mlp.up_proj")];
    !beside.iter().any(|part| name.contains(part))
}

const PLACES: [Place; 10] = [
    Place {
        name: "the residual stream",
        make: |w| {
            // 40000 comes in, and the block adds about as much: feature 90 x 90 times 5.
            w.set_table("embed_tokens", Some(w.token), Some(CHANNEL), 40_000.0);
            for projection in [Projection::Gate, Projection::Up] {
                set(w.projection(projection, LAST), Some(FEATURE), Some(CHANNEL), 20.0);
            }
            set(w.projection(Projection::Down, LAST), Some(CHANNEL), Some(FEATURE), 5.0);
        },
        overflow: Overflow::Channel,
    },
    Place {
        name: "the MLP's product",
        make: |w| {
            for projection in [Projection::Gate, Projection::Up] {
                set(w.projection(projection, LAST), Some(FEATURE), Some(CHANNEL), 300.0);
            }
        },
        overflow: Overflow::Rows,
    },
    Place {
        name: "the values of attention",
        make: |w| {
            set(w.projection(Projection::V, LAST), Some(3), Some(CHANNEL), 60_000.0);
            // Its two heads' third outputs are not read, lest ordinary rows send gradients through so large a weight.
            for column in [3, 8 + 3] {
                set(w.projection(Projection::O, LAST), None, Some(column), 0.0);
                set(w.lora(Projection::O, LAST, "lora_A"), None, Some(column), 0.0);
            }
            set(w.lora(Projection::O, LAST, "lora_B"), None, None, 0.0);
        },
        overflow: Overflow::Document,
    },
    Place {
        name: "the logits",
        make: |w| {
            w.set_table("lm_head", Some(UNLIKELY), Some(CHANNEL), 60_000.0);
            // Ordinary rows send no gradient through so large a weight, for they find the token unlikely.
            w.set_table("embed_tokens", None, Some(CHANNEL + 1), 3.0);
            w.set_table("lm_head", Some(UNLIKELY), Some(CHANNEL + 1), -8.0);
        },
        overflow: Overflow::Logits,
    },
    Place {
        name: "the gradient of the head's weights",
        make: |w| set(w.norm("norm"), Some(CHANNEL), None, 2000.0),
        overflow: Overflow::Gradients(|name| name.contains("lm_head")),
    },
    Place {
        name: "the gradient of the head's input",
        make: |w| {
            // Where `~` is what should come next, the logit's gradient is not small. The norm hides it from the loss.
            w.set_table("lm_head", Some(w.token), Some(CHANNEL), 2000.0);
            set(w.norm("norm"), Some(CHANNEL), None, 0.0);
        },
        overflow: Overflow::Gradients(|name| !name.contains("lm_head")),
    },
    Place {
        name: "the gradient within a block",
        make: |w| {
            // The gate is 0, and so is the product; the gate's gradient is half the other factor, 45000.
            set(w.projection(Projection::Up, LAST), Some(FEATURE), Some(CHANNEL), 10_000.0);
            set(w.projection(Projection::Down, LAST), Some(2), Some(FEATURE), 30.0);
        },
        overflow: Overflow::Gradients(is_beneath_the_last_gate),
    },
    Place {
        name: "the gradient of lora_A",
        make: |w| {
            // The feature becomes about 40000, and nothing is made of it.
            for projection in [Projection::Gate, Projection::Up] {
                set(w.projection(projection, LAST), Some(FEATURE), Some(CHANNEL), 47.0);
            }
            set(w.projection(Projection::Down, LAST), None, Some(FEATURE), 0.0);
            set(w.lora(Projection::Down, LAST, "lora_A"), None, Some(FEATURE), 0.0);
        },
        overflow: Overflow::Gradients(|name| name == lora_key(Projection::Down, LAST, "lora_A")),
    },
    Place {
        name: "the gradient of lora_B",
        make: |w| {
            // The feature becomes about 100, which the first of the rank's dimensions makes 40000 of, and of nothing else
            // anything; neither the base nor `lora_B` makes anything of them.
            for projection in [Projection::Gate, Projection::Up] {
                set(w.projection(projection, LAST), Some(FEATURE), Some(CHANNEL), 2.4);
            }
            set(w.projection(Projection::Down, LAST), None, Some(FEATURE), 0.0);
            set(w.lora(Projection::Down, LAST, "lora_A"), None, Some(FEATURE), 0.0);
            set(w.lora(Projection::Down, LAST, "lora_A"), Some(0), None, 0.0);
            set(w.lora(Projection::Down, LAST, "lora_A"), Some(0), Some(FEATURE), 200.0);
            set(w.lora(Projection::Down, LAST, "lora_B"), None, Some(0), 0.0);
        },
        overflow: Overflow::Gradients(|name| name == lora_key(Projection::Down, LAST, "lora_B")),
    },
    Place {
        name: "the gradient of the embedding",
        // A row of zeros is normalised by 1 / sqrt(eps), and so is its gradient.
        make: |w| w.set_table("embed_tokens", Some(w.token), None, 0.0),
        overflow: Overflow::Gradients(|name| name.contains("embed_tokens")),
    },
];

pub(crate) fn token_id() -> i64 {
    let path = golden_dir().join("attention_rslora_uneven/tokenizer/tokenizer.json");
    let tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["~"].as_i64().unwrap()
}

/// A job in fp16 whose steps [`OVERFLOWS`] overflow at a place.
fn lab(place: &Place) -> Lab {
    let n_steps = format!("train.max_steps={STEPS}");
    let global_batch = format!("train.global_batch={GLOBAL_BATCH}");
    let lab = Lab::new(Shape { layers: LAYERS, ..Shape::default() })
        .with(&["model.dtype=fp16", "train.micro_batch_tokens=160", &n_steps, &global_batch])
        .with(&["lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]", "train.checkpoint_every=1"])
        .with_init_adapter();
    let config = lab.path("base/config.json");
    let mut shape: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    shape["rms_norm_eps"] = json!(1e-12);
    std::fs::write(&config, shape.to_string()).unwrap();
    let (base, adapter) = (lab.path("base/model.safetensors"), lab.path("init_adapter").join(WEIGHTS_FILE));
    let weights = Weights { base: read_tensors(&base), adapter: read_tensors(&adapter), token: token_id() };
    weights.silence();
    (place.make)(&weights);
    for (path, tensors) in [(base, weights.base), (adapter, weights.adapter)] {
        let named: Named = tensors.into_iter().collect();
        write_tensors(&path, &named);
    }

    let mut data = Vec::new();
    for (instruction, _) in rows(STEPS as usize, 8) {
        for n in (2..2 + GLOBAL_BATCH).rev() {
            data.push((instruction.clone(), "stone and river, ".repeat(n)));
        }
    }
    for (step, micro_batch) in OVERFLOWS {
        let (_, output) = &mut data[(step as usize - 1) * GLOBAL_BATCH + micro_batch];
        *output = output.replacen("and", "~", 1);
    }
    lab.write_rows("rows.jsonl", &data);
    lab
}

/// The micro-batches of a step.
fn micro_batches(trainer: &Rig, step: u64) -> Vec<PackedBatch> {
    let first = (step as u32 - 1) * GLOBAL_BATCH as u32;
    let samples: Vec<u32> = (first..first + GLOBAL_BATCH as u32).collect();
    build_batches(&trainer.job.train, &samples, trainer.job.model.loss_average(), 160)
}

/// The loss of a micro-batch and its gradients by name, at a loss scale.
fn scaled_gradients(trainer: &Rig, packed: &PackedBatch, loss_scale: f64) -> (f64, Named) {
    let (model, layout) = (&trainer.model, trainer.params.layout());
    let grads = Gradients::new(layout, Device::Cpu).unwrap();
    let batch = model.batch(packed, None).unwrap();
    let (hidden_nd, saved) = model.forward(&batch, false).unwrap();
    let loss = ScaledLoss::new(loss_scale, Device::Cpu).unwrap();
    let dhidden_nd = model.head_loss(&hidden_nd, &batch, &grads, &loss).unwrap();
    model.backward(saved, dhidden_nd, &batch, &grads, &mut |_| Ok(())).unwrap();
    (loss.value().unwrap().double_value(&[]), named_views(layout, grads.flat()).unwrap())
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
}

#[test]
fn each_place_overflows_and_no_other() {
    for place in &PLACES {
        let (lab, name) = (lab(place), place.name);
        let trainer = trainer(lab.config(&[]));
        for step in 1..=STEPS {
            let at = OVERFLOWS.iter().find(|(s, _)| *s == step).map(|(_, micro_batch)| *micro_batch);
            let batches = micro_batches(&trainer, step);
            assert_eq!(batches.len(), GLOBAL_BATCH);
            for (i, packed) in batches.iter().enumerate() {
                let loud = packed.input_ids.iter().position(|&id| id == token_id());
                assert_eq!(loud.is_some(), at == Some(i), "{name}: step {step}, micro-batch {i}");
                let hidden_nd = trainer.model.hidden(&trainer.model.batch(packed, None).unwrap()).unwrap();
                // The run below has scales of 2^16 to 2^14: here there is room beyond both.
                let (loss, grads) = scaled_gradients(&trainer, packed, if loud.is_some() { 4096.0 } else { 131_072.0 });
                let overflowed: BTreeSet<&str> =
                    grads.iter().filter(|(_, grad)| !is_finite(grad)).map(|(key, _)| key.as_str()).collect();
                let Some(loud) = loud else {
                    assert!(is_finite(&hidden_nd) && loss.is_finite(), "{name}: step {step}, micro-batch {i}: {loss}");
                    assert!(overflowed.is_empty(), "{name}: step {step}, micro-batch {i}: {overflowed:?}");
                    continue;
                };
                assert_place(place, &hidden_nd, loud as i64, loss, &grads, &overflowed);
            }
        }
    }
}

#[track_caller]
fn assert_place(place: &Place, hidden_nd: &Tensor, loud: i64, loss: f64, grads: &Named, overflowed: &BTreeSet<&str>) {
    let name = place.name;
    let bad_nd = hidden_nd.isfinite().logical_not();
    let [n_bad, n_bad_in_row] = [&bad_nd, &bad_nd.get(loud)].map(|bad| bad.sum(tch::Kind::Int64).int64_value(&[]));
    let width = hidden_nd.size()[1];
    match place.overflow {
        Overflow::Channel => {
            assert!(n_bad == 1 && bad_nd.int64_value(&[loud, CHANNEL]) == 1, "{name}: {n_bad} outputs overflow");
        }
        Overflow::Rows => assert_eq!((n_bad, n_bad_in_row), (width, width), "{name}"),
        Overflow::Document => assert!(n_bad > width && n_bad_in_row == width, "{name}: {n_bad} outputs overflow"),
        Overflow::Logits | Overflow::Gradients(_) => assert_eq!(n_bad, 0, "{name}: outputs of the last block"),
    }
    let Overflow::Gradients(is_among) = place.overflow else {
        assert!(!loss.is_finite(), "{name}: loss {loss}");
        return;
    };
    assert!(loss.is_finite(), "{name}: loss {loss}");
    let expected: BTreeSet<&str> = grads.iter().map(|(key, _)| key.as_str()).filter(|key| is_among(key)).collect();
    assert!(!expected.is_empty());
    assert_eq!(*overflowed, expected, "{name}");
}

/// What a step did, bit for bit and without what a clock says. (A loss that is not a number is equal to itself here.)
fn timeless(metrics: &StepMetrics) -> Value {
    let bits = |number: Option<f64>| number.map(f64::to_bits);
    json!([
        metrics.step,
        bits(metrics.loss),
        bits(metrics.grad_norm),
        metrics.lr,
        metrics.samples,
        metrics.tokens,
        metrics.label_tokens,
        metrics.loss_scale,
        metrics.skipped
    ])
}

fn copies(named: &Named) -> Named {
    named.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect()
}

/// Parameters and moments by name.
fn parameters(trainer: &Rig) -> Named {
    let mut named = snapshot(&trainer.params);
    named.extend(copies(&trainer.optimizer.named_moments(trainer.params.layout()).unwrap()));
    named
}

#[track_caller]
fn assert_same_bits(what: &str, ours: &Named, judge: &Named) {
    assert_eq!(ours.len(), judge.len());
    for ((name, a), (_, b)) in ours.iter().zip(judge) {
        assert!(is_finite(a) && a.equal(b), "{what}: {name} differs");
    }
}

/// Does all steps of a job, each held against what it should do; gives their metrics and the final state.
fn run_to_end(name: &str, lab: &Lab) -> (Vec<Value>, Named) {
    let mut trainer = trainer(lab.config(&[]));
    let (mut scale, mut updates) = (65536.0, 0);
    let mut lines = Vec::new();
    for step in 1..=STEPS {
        let what = format!("{name}: step {step}");
        let before = parameters(&trainer);
        let line = trainer.step().unwrap();
        let after = parameters(&trainer);
        let overflows = OVERFLOWS.iter().any(|(s, _)| *s == step);
        assert_eq!((line.step, line.skipped, line.loss_scale), (step, overflows, scale), "{what}");
        let is_finite = line.loss.unwrap().is_finite() && line.grad_norm.unwrap().is_finite();
        assert_eq!(is_finite, !overflows, "{what}: loss {:?}, gradient norm {:?}", line.loss, line.grad_norm);
        // Its samples are consumed either way; the schedule waits.
        let samples = (step as usize - 1) * GLOBAL_BATCH..step as usize * GLOBAL_BATCH;
        let tokens: usize = samples.map(|sample| trainer.job.train.ids(sample).len()).sum();
        assert_eq!((line.samples, line.tokens), (GLOBAL_BATCH as u64, tokens as u64), "{what}");
        assert_eq!(line.lr, trainer.job.schedule.lr(updates), "{what}");
        if overflows {
            scale /= 2.0;
            assert_same_bits(&what, &after, &before);
        } else {
            updates += 1;
            let moved = before.iter().zip(&after).any(|((_, a), (_, b))| !a.equal(b));
            assert!(moved, "{what}: neither parameters nor moments have moved");
        }
        let state = &trainer.state;
        assert_eq!((state.step, state.updates, state.loss_scale.factor()), (step, updates, scale), "{what}");
        lines.push(timeless(&line));
    }
    (lines, parameters(&trainer))
}

#[test]
fn an_overflow_anywhere_skips_the_update_and_nothing_else() {
    for place in &PLACES {
        let lab = lab(place);
        let (lines, end) = run_to_end(place.name, &lab);
        let (again, end_again) = run_to_end(place.name, &lab);
        assert_eq!(again, lines, "{}", place.name);
        assert_same_bits(place.name, &end_again, &end);
    }
}

#[test]
fn an_overflow_anywhere_is_logged_and_the_same_after_a_resume() {
    for place in &PLACES {
        let lab = lab(place);
        // From before all overflows and from between two that adjoin.
        straight_equals_resumed(place.name, &lab, STEPS, &[1, 2]);
        let log = std::fs::read_to_string(lab.path("run/train.log")).unwrap();
        for line in metrics(&lab.path("run")) {
            let step = line["step"].as_u64().unwrap();
            let overflows = OVERFLOWS.iter().any(|(s, _)| *s == step);
            assert_eq!(line["skipped"], overflows, "{}: {line}", place.name);
            let said = log.contains(&format!("step {step} was skipped"));
            assert_eq!(said, overflows, "{}: step {step} in {log}", place.name);
        }
    }
}

/// A job in fp16 whose every step overflows at whatever loss scale.
fn hopeless() -> Lab {
    let lab = lab(&PLACES[0]);
    let data: Vec<_> = rows(6, 8).into_iter().map(|(instruction, _)| (instruction, "stone ~ river".into())).collect();
    lab.write_rows("rows.jsonl", &data);
    lab
}

#[test]
fn an_overflow_at_the_smallest_loss_scale_is_a_failure() {
    let lab = hopeless();
    let scale = json!({ "scale": 2.0, "good_updates": 0, "dynamic": true });
    let scale: LossScale = serde_json::from_value(scale).unwrap();
    let mut trainer = trainer_at(lab.config(&[]), |state| state.loss_scale = scale);
    assert!(trainer.step().unwrap().skipped);
    assert_eq!(trainer.state.loss_scale.factor(), 1.0);
    let error = trainer.step().unwrap_err();
    assert!(matches!(error, Error::Failed(_)) && error.to_string().contains("loss scale 1"), "{error}");

    // From 2^16 down to 1 is 16 halvings.
    let ran = lab.run("train", &[], &["train.max_steps=40"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("step 17") && ran.stderr.contains("loss scale 1"), "{}", ran.stderr);
    assert!(ran.stderr.contains("rows.jsonl:") && ran.stderr.contains("hint: "), "{}", ran.stderr);
    let scales: Vec<f64> = metrics(&lab.path("run")).iter().map(|line| line["loss_scale"].as_f64().unwrap()).collect();
    assert_eq!(scales, (0..16).map(|i| 65536.0 / f64::from(1 << i)).collect::<Vec<_>>());
    // What was saved is from before the failure, and there is no adapter that looks finished.
    assert!(lab.path("run/checkpoints/step-00000016").exists() && !lab.path("run/adapter").exists());
}
