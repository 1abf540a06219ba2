//! The gradient of every trained tensor of a whole model against libtorch's autograd of a plainly written Llama.
//!
//! The judge runs in fp64, one document at a time, without packing, fusion or chunks; the engine in fp32, as in
//! training. They differ by the engine's rounding: a few hundred products and sums on the way down leave about 1e-6 of
//! a tensor's largest element, and any wrong term, mask, scale or document border a thousand times more.

use std::collections::BTreeMap;

use bellora::data::{LossAverage, build_batches};
use bellora::model::lora::LoraSpec;
use bellora::model::params::{lora_key, table_key};
use bellora::model::shape::{ModelShape, Projection, Table};
use bellora::ops::dropout::{self, DropoutKey, RowOrigin};
use bellora::ops::rope::RopeScaling;
use tch::{Device, Kind, Tensor};

use crate::support::{Lab, Rig, Shape, assert_tensors_close, gradients, target_of, trainer};

const BOUND: f64 = 2e-5;
/// Sums of a hundred terms near 6 in fp32.
const LOSS_BOUND: f64 = 2e-6;

/// A Llama as its papers write it, in fp64, with the trained tensors as leaves.
struct Judge {
    config: ModelShape,
    lora: LoraSpec,
    frozen: BTreeMap<String, Tensor>,
    trained: BTreeMap<String, Tensor>,
}

/// One document in the judge's hands.
struct Document<'a> {
    ids: &'a [u32],
    slot: u64,
    dropout: Option<DropoutKey>,
}

impl Judge {
    fn new(trainer: &Rig) -> Self {
        let model = &trainer.job.model;
        let load = |name: &String| {
            let tensor = model.files.load(name, Kind::Float, Device::Cpu).unwrap().to_kind(Kind::Double);
            (name.clone(), tensor)
        };
        let leaf = |(name, tensor): (String, Tensor)| (name, tensor.to_kind(Kind::Double).set_requires_grad(true));
        Self {
            config: model.base.clone(),
            lora: model.lora.clone(),
            frozen: model.files.tensors().keys().map(load).collect(),
            trained: trainer.params.named().unwrap().into_iter().map(leaf).collect(),
        }
    }

    fn table(&self, table: Table) -> &Tensor {
        let source = if self.config.tie_word_embeddings { Table::Embed } else { table };
        self.trained.get(&table_key(table)).unwrap_or_else(|| &self.frozen[source.base_key()])
    }

    fn norm(&self, x_td: &Tensor, name: &str) -> Tensor {
        let mean_square = x_td.square().mean_dim(-1, true, Kind::Double);
        x_td / (mean_square + self.config.rms_norm_eps).sqrt() * &self.frozen[name]
    }

    /// The factors that dropout puts on a document's input of width `channels`.
    fn mask(&self, document: &Document, site: usize, channels: i64) -> Option<Tensor> {
        let key = document.dropout?;
        let n = document.ids.len() as i64;
        let long = (Kind::Int64, Device::Cpu);
        let origin =
            RowOrigin { slot_n: Tensor::full([n], document.slot as i64, long), token_n: Tensor::arange(n, long) };
        let ones = Tensor::ones([n, channels], (Kind::Float, Device::Cpu));
        Some(dropout::apply(target_of(&ones), &ones, key, site as u32, &origin).unwrap().to_kind(Kind::Double))
    }

    fn linear(&self, x_ti: &Tensor, layer: usize, projection: Projection, mask: &Option<Tensor>) -> Tensor {
        let mut y_to = x_ti.matmul(&self.frozen[&format!("{}.weight", projection.module(layer))].tr());
        if let Some(bias) = self.frozen.get(&format!("{}.bias", projection.module(layer))) {
            y_to += bias;
        }
        if !self.lora.adapts(projection) {
            return y_to;
        }
        let [a, b] = ["lora_A", "lora_B"].map(|matrix| &self.trained[&lora_key(projection, layer, matrix)]);
        let seen = mask.as_ref().map_or_else(|| x_ti.shallow_clone(), |mask| x_ti * mask);
        let r = self.lora.r as f64;
        let scale = self.lora.alpha / if self.lora.use_rslora { r.sqrt() } else { r };
        y_to + seen.matmul(&a.tr()).matmul(&b.tr()) * scale
    }

    fn inverse_frequencies(&self) -> Vec<f64> {
        let e = self.config.head_dim;
        let plain = (0..e / 2).map(|i| 1.0 / self.config.rope_theta.powf(2.0 * i as f64 / e as f64));
        let scaled = |f: f64| {
            let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
                self.config.rope_scaling
            else {
                return f;
            };
            let wavelength = 2.0 * std::f64::consts::PI / f;
            let (short, long) = (
                original_max_position_embeddings / high_freq_factor,
                original_max_position_embeddings / low_freq_factor,
            );
            if wavelength < short {
                f
            } else if wavelength > long {
                f / factor
            } else {
                let share = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - share) * f / factor + share * f
            }
        };
        // Checkpoints are trained with frequencies that were rounded to fp32.
        plain.map(|f| f64::from(scaled(f) as f32)).collect()
    }

    /// Turns the pairs `(i, i + E/2)` of each head by the position times a frequency: `x [T, H, E]`.
    fn rope(&self, x_the: &Tensor) -> Tensor {
        let half = self.config.head_dim / 2;
        let positions = Tensor::arange(x_the.size()[0], (Kind::Double, Device::Cpu));
        let angle = positions.outer(&Tensor::from_slice(&self.inverse_frequencies())).unsqueeze(1);
        let (a, b) = (x_the.narrow(2, 0, half), x_the.narrow(2, half, half));
        Tensor::cat(&[&a * angle.cos() - &b * angle.sin(), &b * angle.cos() + &a * angle.sin()], 2)
    }

    fn attention(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (t, e) = (q.size()[0], self.config.head_dim);
        let heads = |x: &Tensor| x.view([t, -1, e]);
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let normed = |x: Tensor, name: &str| {
            let name = format!("model.layers.{layer}.self_attn.{name}.weight");
            if self.frozen.contains_key(&name) { self.norm(&x, &name) } else { x }
        };
        let q_hte = self.rope(&normed(heads(q), "q_norm")).transpose(0, 1);
        let k_hte = self.rope(&normed(heads(k), "k_norm")).repeat_interleave_self_int(group, 1, None).transpose(0, 1);
        let v_hte = heads(v).repeat_interleave_self_int(group, 1, None).transpose(0, 1);
        let future = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = q_hte.matmul(&k_hte.transpose(1, 2)) / (e as f64).sqrt();
        let p = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Double);
        p.matmul(&v_hte).transpose(0, 1).reshape([t, -1])
    }

    /// The log-probabilities `[T, V]` that follow each token.
    fn log_probabilities(&self, document: &Document) -> Tensor {
        let ids: Vec<i64> = document.ids.iter().map(|&id| i64::from(id)).collect();
        let mut x = self.table(Table::Embed).index_select(0, &Tensor::from_slice(&ids));
        for layer in 0..self.config.num_hidden_layers {
            let linear = |x: &Tensor, p: Projection, mask: &Option<Tensor>| self.linear(x, layer, p, mask);
            let mask = |input: &Tensor, site: usize| self.mask(document, layer * 4 + site, input.size()[1]);

            let h = self.norm(&x, &format!("model.layers.{layer}.input_layernorm.weight"));
            let m = mask(&h, 0);
            let [q, k, v] = [Projection::Q, Projection::K, Projection::V].map(|p| linear(&h, p, &m));
            let o = self.attention(layer, &q, &k, &v);
            x = &x + linear(&o, Projection::O, &mask(&o, 1));

            let h = self.norm(&x, &format!("model.layers.{layer}.post_attention_layernorm.weight"));
            let m = mask(&h, 2);
            let [gate, up] = [Projection::Gate, Projection::Up].map(|p| linear(&h, p, &m));
            let h = &gate * gate.sigmoid() * up;
            x = &x + linear(&h, Projection::Down, &mask(&h, 3));
        }
        let logits = self.norm(&x, "model.norm.weight").matmul(&self.table(Table::Head).tr());
        logits.log_softmax(-1, Kind::Double)
    }

    /// The sum of the losses of a document's learned tokens, and how many there are.
    fn document_loss(&self, document: &Document, learned: &[usize]) -> (Tensor, usize) {
        let log_p = self.log_probabilities(document);
        let learned: Vec<i64> = learned.iter().map(|&at| at as i64).collect();
        let targets: Vec<i64> = learned.iter().map(|&at| i64::from(document.ids[at as usize])).collect();
        let rows = Tensor::from_slice(&learned) - 1;
        let picked = log_p.index_select(0, &rows).gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false);
        (-picked.sum(Kind::Double), learned.len())
    }
}

/// The loss of an update: the mean over groups of samples of each group's mean over label tokens. All of the update is
/// one group where the loss is averaged over tokens.
fn update_loss(judge: &Judge, trainer: &Rig, samples: &[u32], group: usize, dropout: Option<DropoutKey>) -> Tensor {
    let data = &trainer.job.train;
    let mut losses = Vec::new();
    for (first, members) in samples.chunks(group).enumerate() {
        let (mut sum, mut n_labels) = (Tensor::from(0.0f64), 0);
        for (at, &sample) in members.iter().enumerate() {
            let (ids, slot) = (data.ids(sample as usize), (first * group + at) as u64);
            let (loss, n) = judge
                .document_loss(&Document { ids, slot, dropout }, &data.learned(sample as usize).collect::<Vec<_>>());
            (sum, n_labels) = (sum + loss, n_labels + n);
        }
        if n_labels > 0 {
            losses.push(sum / n_labels as f64);
        }
    }
    Tensor::stack(&losses, 0).mean(Kind::Double)
}

fn check(name: &str, shape: Shape, sets: &[&str]) {
    let lab = Lab::new(shape).with(sets).with_init_adapter();
    let trainer = trainer(lab.config(&[]));
    let settings = &trainer.job.model.config;
    // Out of order and not all of the data: an update is a list of samples.
    let samples = [3, 0, 11, 7, 5];
    let group = match settings.train.loss_average {
        LossAverage::Tokens => samples.len(),
        LossAverage::Samples { group } => group,
    };
    let p = settings.lora.dropout;
    let dropout = (p > 0.0).then_some(DropoutKey { p, seed: 9, step: 3 });

    let judge = Judge::new(&trainer);
    let loss = update_loss(&judge, &trainer, &samples, group, dropout);
    let leaves: Vec<&Tensor> = judge.trained.values().collect();
    let judged = Tensor::run_backward(&[&loss], &leaves, false, false);
    let judged: BTreeMap<String, Tensor> = judge.trained.keys().cloned().zip(judged).collect();

    for (variant, micro_batch_tokens, recompute) in
        [("one micro-batch", 4096, false), ("several", 260, false), ("several, recomputed", 260, true)]
    {
        let n = build_batches(&trainer.job.train, &samples, trainer.job.model.loss_average(), micro_batch_tokens).len();
        assert_eq!(n > 1, micro_batch_tokens == 260, "{n} micro-batches");
        let (ours, grads) = gradients(&trainer, &samples, micro_batch_tokens, recompute, dropout);
        let off = (ours - loss.double_value(&[])).abs();
        println!("{name}, {variant}: loss {ours:.6}, off by {off:.1e}");
        assert!(off <= LOSS_BOUND, "{name}, {variant}: loss {ours}, expected {loss}");
        assert_tensors_close(&format!("{name}, {variant}"), &grads, &judged, BOUND);
    }
}

#[test]
fn all_projections_and_both_tables_with_dropout_and_llama3_rope() {
    let shape = Shape { llama3_rope: true, heads: 6, kv_heads: 2, head_dim: 12, ..Shape::default() };
    let tables = "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]";
    check("all seven, both tables, dropout", shape, &[tables, "lora.dropout=0.1"]);
}

#[test]
fn groups_of_samples_with_a_tied_head_trained_apart() {
    let shape = Shape { is_tied: true, kv_heads: 4, layers: 3, ..Shape::default() };
    let sets = [
        "lora.modules_to_save=[\"lm_head\"]",
        "lora.target_modules=[\"k_proj\", \"o_proj\", \"up_proj\"]",
        "lora.use_rslora=true",
        "train.loss_average=samples",
        "train.loss_group_samples=2",
    ];
    check("tied head, groups of two", shape, &sets);
}

#[test]
fn adapters_alone_where_the_lowest_block_passes_nothing_down() {
    let sets = ["lora.target_modules=[\"q_proj\", \"v_proj\", \"gate_proj\", \"down_proj\"]", "lora.dropout=0.3"];
    check("frozen tables, one key-value head", Shape { kv_heads: 1, ..Shape::default() }, &sets);
}

#[test]
fn biases_on_all_projections() {
    let shape = Shape { has_biases: true, ..Shape::default() };
    check("biases on all seven", shape, &["lora.target_modules=[\"v_proj\", \"o_proj\", \"up_proj\"]"]);
}

#[test]
fn biases_on_queries_keys_and_values_with_a_tied_head() {
    let tables = "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]";
    let shape = Shape { model_type: "qwen2", is_tied: true, kv_heads: 1, ..Shape::default() };
    check("qwen2", shape, &[tables, "lora.dropout=0.1"]);
}

#[test]
fn norms_of_heads_of_a_width_of_their_own() {
    let shape = Shape { model_type: "qwen3", heads: 6, head_dim: 10, ..Shape::default() };
    check("qwen3", shape, &["lora.dropout=0.1"]);
    let tables = "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]";
    let adapted = "lora.target_modules=[\"q_proj\", \"gate_proj\"]";
    let shape = Shape { model_type: "qwen3", has_biases: true, kv_heads: 4, ..Shape::default() };
    check("qwen3 with biases", shape, &[tables, adapted]);
}
