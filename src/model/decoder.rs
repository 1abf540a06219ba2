//! The whole model: embedding, blocks, final norm, head; forward, loss and backward over a packed micro-batch.

use tch::{Device, Kind, Tensor};

use crate::batch::{Batch, PackedBatch};
use crate::error::{Error, Result};
use crate::formats::model_keys::CONFIG;
use crate::model::adapted_linear::{AdaptedLinear, AdapterPlace};
use crate::model::block::{Block, BlockSaved};
use crate::model::frozen_weight::FrozenWeight;
use crate::model::head_norms::HeadNorms;
use crate::model::kv_cache::KvCache;
use crate::model::lora::LoraSpec;
use crate::model::params::{Gradients, ParamBuffer, lora_key, padded_head_rows, table_key};
use crate::model::shape::{FINAL_NORM, ModelShape, Norm, Projection, Table};
use crate::model::weights::BaseWeights;
use crate::ops::cross_entropy::{self, ScaledLoss};
use crate::ops::dropout::DropoutKey;
use crate::ops::rope::{RopeTable, inverse_frequencies};
use crate::ops::target::Target;
use crate::ops::{embedding, gemm, rms_norm};
use crate::progress::Work;
use crate::torch::number::range;
use crate::torch::transfer;

/// One chunk of logits on a CPU holds at most this many elements (64 MB in fp32): more would not stay in its caches.
const LOGITS_PER_CHUNK: i64 = 1 << 24;
/// Rows of a chunk of logits, at most; on a GPU always, for its products want many rows.
const ROWS_PER_CHUNK: i64 = 2048;

/// What is kept of a forward pass for backward.
#[derive(Debug)]
pub struct Saved {
    blocks: Vec<SavedBlock>,
}

/// What is kept of one block: everything, or its input alone (recompute).
#[derive(Debug)]
enum SavedBlock {
    All(Box<BlockSaved>),
    Input(Tensor),
}

/// A vocabulary table: frozen, or the compute copy of a trained one with its place in the gradients. `P` rows: those of the
/// vocabulary, and in half precision the padding of a head (or of the table that it shares).
#[derive(Debug)]
struct TableWeight {
    weight_pd: Tensor,
    param: Option<usize>,
}

/// A model of the Llama family with adapters.
#[derive(Debug)]
pub struct Decoder {
    config: ModelShape,
    embed: TableWeight,
    blocks: Vec<Block>,
    norm_d: Tensor,
    head: TableWeight,
    /// Rows of the tables, grown ones included, padding not.
    vocab_size: i64,
    rope: RopeTable,
    target: Target,
}

/// How the model computes.
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// Dtype of weights, activations and products.
    pub kind: Kind,
    /// Where.
    pub device: Device,
    /// The longest document it will see.
    pub max_positions: i64,
}

impl Decoder {
    /// Loads (or draws) the frozen weights and puts the adapters on them; views of `params` stay inside.
    ///
    /// # Errors
    /// Texts that are longer than the model attends; as [`BaseWeights::fill`].
    pub fn load(
        config: &ModelShape,
        base: BaseWeights<'_>,
        lora: &LoraSpec,
        params: &ParamBuffer,
        compute: Compute,
    ) -> Result<Self> {
        let Compute { kind, device, max_positions } = compute;
        if let Some(fault) = config.refuse_longer_than_window(max_positions, CONFIG.file) {
            return Err(Error::Invalid(vec![fault]));
        }
        let inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling);
        let Tables { embed, head, vocab_size } = load_tables(config, base, lora, params, compute)?;
        let work = Work::begin("loading the base", "layers", config.num_hidden_layers as u64);
        let load = |layer| {
            let block = load_block(config, base, lora, params, compute, layer);
            work.advance(1);
            block
        };
        let blocks = (0..config.num_hidden_layers).map(load).collect::<Result<_>>()?;
        Ok(Self {
            config: config.clone(),
            embed,
            blocks,
            norm_d: base.tensor(FINAL_NORM, &[config.hidden_size], config, (kind, device))?,
            head,
            vocab_size,
            rope: RopeTable::new(&inv_freq, max_positions, kind, device)?,
            target: Target::new(device, kind),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelShape {
        &self.config
    }

    /// Uploads a micro-batch.
    ///
    /// # Errors
    /// A document that is longer than the model was set up for.
    pub fn batch(&self, packed: &PackedBatch, dropout: Option<DropoutKey>) -> Result<Batch> {
        packed.upload(&self.rope, dropout, self.target.device)
    }

    /// Runs the blocks and keeps what backward needs; with `recompute` only each block's input.
    pub fn forward(&self, batch: &Batch, recompute: bool) -> Result<(Tensor, Saved)> {
        let mut x_nd = embedding::forward(&self.embed.weight_pd, &batch.input_ids)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let input = recompute.then(|| x_nd.shallow_clone());
            let (out_nd, saved) = block.forward(x_nd, batch)?;
            blocks.push(match input {
                Some(input) => SavedBlock::Input(input),
                None => SavedBlock::All(Box::new(saved)),
            });
            x_nd = out_nd;
        }
        Ok((x_nd, Saved { blocks }))
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.target.device
    }

    /// Runs the blocks and keeps nothing.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let mut x_nd = embedding::forward(&self.embed.weight_pd, &batch.input_ids)?;
        for block in &self.blocks {
            x_nd = block.forward(x_nd, batch)?.0;
        }
        Ok(x_nd)
    }

    /// Adds the loss over the learned rows to `loss` and computes its gradient at the last block's output `[N, D]`.
    ///
    /// Rows without a learned next token never reach the head. A trained head accumulates its own gradient. Gradients
    /// carry the loss scale.
    pub fn head_loss(&self, hidden_nd: &Tensor, batch: &Batch, grads: &Gradients, loss: &ScaledLoss) -> Result<Tensor> {
        let rows_md = hidden_nd.f_index_select(0, &batch.learned_rows)?;
        let (h_md, norm) = rms_norm::forward(self.target, &rows_md, &self.norm_d, self.config.rms_norm_eps)?;
        let dh_md = h_md.f_empty_like()?;
        for (first, n) in self.chunks(h_md.size()[0]) {
            let h = h_md.f_narrow(0, first, n)?;
            let logits = gemm::nt(self.target, &h, &self.head.weight_pd)?;
            let (targets, weights) = (batch.targets.f_narrow(0, first, n)?, batch.weights.f_narrow(0, first, n)?);
            let dlogits =
                cross_entropy::forward_backward(self.target, logits, self.vocab_size, &targets, &weights, loss)?;
            dh_md.f_narrow(0, first, n)?.f_copy_(&gemm::nn(self.target, &dlogits, &self.head.weight_pd)?)?;
            if let Some(index) = self.head.param {
                gemm::accumulate_tn_(self.target, &grads.view(index)?, &dlogits.f_narrow(1, 0, self.vocab_size)?, &h)?;
            }
        }
        let no_residual = rows_md.f_zeros_like()?;
        let (drows_md, _) = rms_norm::backward(self.target, &dh_md, &rows_md, &self.norm_d, &norm, &no_residual)?;
        let mut dhidden_nd = hidden_nd.f_zeros_like()?;
        let _ = dhidden_nd.f_index_copy_(0, &batch.learned_rows, &drows_md)?;
        Ok(dhidden_nd)
    }

    /// Carries the gradient from the last block's output down to everything that is trained. `after` is called whenever more
    /// of the gradients is complete, as far as this micro-batch goes.
    pub fn backward(
        &self,
        saved: Saved,
        dhidden_nd: Tensor,
        batch: &Batch,
        grads: &Gradients,
        after: &mut dyn FnMut(Done) -> Result<()>,
    ) -> Result<()> {
        let mut dx_nd = dhidden_nd;
        for (block, saved) in self.blocks.iter().zip(saved.blocks).rev() {
            let saved = match saved {
                SavedBlock::All(saved) => *saved,
                SavedBlock::Input(x_nd) => block.forward(x_nd, batch)?.1,
            };
            let need_dx = block.layer > 0 || self.embed.param.is_some();
            match block.backward(saved, dx_nd, batch, grads, need_dx)? {
                Some(dx) => dx_nd = dx,
                None => return after(Done::Everything),
            }
            after(Done::Block(block.layer))?;
        }
        if let Some(index) = self.embed.param {
            embedding::backward_(&grads.view(index)?, &batch.input_ids, &dx_nd)?;
        }
        after(Done::Everything)
    }

    /// The negative log-likelihood of every learned token, `[M]` in fp32.
    pub fn nll(&self, batch: &Batch) -> Result<Tensor> {
        let rows_md = self.hidden(batch)?.f_index_select(0, &batch.learned_rows)?;
        let nll: Vec<Tensor> = self
            .chunks(rows_md.size()[0])
            .map(|(first, n)| {
                let logits = self.logits(&rows_md.f_narrow(0, first, n)?)?;
                cross_entropy::nll(&logits, &batch.targets.f_narrow(0, first, n)?)
            })
            .collect::<Result<_>>()?;
        Ok(Tensor::f_cat(&nll, 0)?)
    }

    /// An empty cache for one text of at most `max_tokens` tokens.
    pub fn new_cache(&self, max_tokens: i64) -> Result<KvCache> {
        KvCache::new(
            self.blocks.len(),
            max_tokens,
            self.config.heads(),
            self.embed.weight_pd.kind(),
            self.target.device,
        )
    }

    /// Reads the next tokens of a text (a whole prompt at first, then one at a time) and returns the logits `[V]` that
    /// follow the last of them.
    pub fn decode(&self, ids: &[i64], cache: &mut KvCache) -> Result<Tensor> {
        let start = cache.len();
        let positions = range(start, start + ids.len() as i64, (Kind::Int64, self.target.device))?;
        let rotation = self.rope.at(&positions)?;
        let ids = transfer::upload(ids, self.target.device)?;
        let mut x_nd = embedding::forward(&self.embed.weight_pd, &ids)?;
        for (block, cache) in self.blocks.iter().zip(cache.layers_mut()) {
            x_nd = block.decode(&x_nd, &rotation, cache)?;
        }
        Ok(self.logits(&x_nd.f_narrow(0, x_nd.size()[0] - 1, 1)?)?.f_squeeze_dim(0)?)
    }

    /// The logits of rows of the last block's output: `[M, D] -> [M, V]`.
    pub fn logits(&self, rows_md: &Tensor) -> Result<Tensor> {
        let (h_md, _) = rms_norm::forward(self.target, rows_md, &self.norm_d, self.config.rms_norm_eps)?;
        Ok(gemm::nt(self.target, &h_md, &self.head.weight_pd)?.f_narrow(1, 0, self.vocab_size)?)
    }

    fn chunks(&self, n_rows: i64) -> impl Iterator<Item = (i64, i64)> {
        let size = rows_per_chunk(self.vocab_size, self.target.device);
        (0..n_rows).step_by(size as usize).map(move |first| (first, size.min(n_rows - first)))
    }
}

/// Rows whose logits are made at a time.
pub fn rows_per_chunk(vocab_size: i64, device: Device) -> i64 {
    if device.is_cuda() { ROWS_PER_CHUNK } else { (LOGITS_PER_CHUNK / vocab_size).clamp(64, ROWS_PER_CHUNK) }
}

/// How far backward has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// Through the head.
    Head,
    /// Through this block.
    Block(usize),
    /// Through all there is.
    Everything,
}

/// Both tables and the rows that count.
struct Tables {
    embed: TableWeight,
    head: TableWeight,
    vocab_size: i64,
}

/// Loads the two tables; a tied model whose tables are both frozen shares one.
fn load_tables(
    config: &ModelShape,
    base: BaseWeights<'_>,
    lora: &LoraSpec,
    params: &ParamBuffer,
    compute: Compute,
) -> Result<Tables> {
    let Compute { kind, device, .. } = compute;
    // Only trained tables have grown.
    let mut vocab_size = config.vocab_size;
    let mut load = |table: Table, n_rows: i64| -> Result<TableWeight> {
        if lora.trains(table) {
            let param = params
                .layout()
                .index_of(&table_key(table))
                .ok_or_else(|| Error::failed(table.name(), "is trained but has no place among the parameters"))?;
            vocab_size = params.layout().entries()[param].shape[0];
            let weight_pd =
                if table == Table::Head { params.compute_head(param)? } else { params.compute_stacked(param, 1)? };
            return Ok(TableWeight { weight_pd, param: Some(param) });
        }
        let source = if config.tie_word_embeddings { Table::Embed } else { table };
        let weight_pd = Tensor::f_zeros([n_rows, config.hidden_size], (kind, device))?;
        base.fill(source.base_key(), config, &weight_pd.f_narrow(0, 0, config.vocab_size)?)?;
        Ok(TableWeight { weight_pd, param: None })
    };
    let padded = padded_head_rows(config.vocab_size, kind);
    let shared = config.tie_word_embeddings && !lora.trains(Table::Embed) && !lora.trains(Table::Head);
    let embed = load(Table::Embed, if shared { padded } else { config.vocab_size })?;
    let head = if shared {
        TableWeight { weight_pd: embed.weight_pd.shallow_clone(), param: None }
    } else {
        load(Table::Head, padded)?
    };
    Ok(Tables { embed, head, vocab_size })
}

fn load_block(
    config: &ModelShape,
    base: BaseWeights<'_>,
    lora: &LoraSpec,
    params: &ParamBuffer,
    compute: Compute,
    layer: usize,
) -> Result<Block> {
    let Compute { kind, device, .. } = compute;
    let target = Target::new(device, kind);
    let map = |projections: &[Projection]| -> Result<AdaptedLinear> {
        let named = |p: &Projection| (p.weight(layer), p.shape(config)[0]);
        let parts: Vec<(String, i64)> = projections.iter().map(named).collect();
        let weight = FrozenWeight::load(base, &parts, projections[0].shape(config)[1], config, target)?;
        let mut places = Vec::new();
        let mut start = 0;
        let is_biased = projections.iter().any(|p| config.biases.contains(p));
        let bias_o = match is_biased {
            true => Some(Tensor::f_zeros(parts.iter().map(|(_, rows)| rows).sum::<i64>(), (kind, device))?),
            false => None,
        };
        for p in projections {
            let width = p.shape(config)[0];
            if let Some(bias_o) = bias_o.as_ref().filter(|_| config.biases.contains(p)) {
                base.fill(&p.bias(layer), config, &bias_o.f_narrow(0, start, width)?)?;
            }
            let index = |matrix| params.layout().index_of(&lora_key(*p, layer, matrix));
            if let (Some(a_index), Some(b_index)) = (index("lora_A"), index("lora_B")) {
                places.push(AdapterPlace { start, width, a_index, b_index });
            }
            start += width;
        }
        AdaptedLinear::new(weight, bias_o, &places, lora.scale(), params, target)
    };
    let norm = |norm: Norm| base.tensor(&norm.key(layer), &[norm.width(config)], config, (kind, device));
    let head_norms = match config.has_head_norms {
        true => Some(HeadNorms { q_e: norm(Norm::Queries)?, k_e: norm(Norm::Keys)?, eps: config.rms_norm_eps }),
        false => None,
    };
    Ok(Block {
        layer,
        target,
        heads: config.heads(),
        rms_norm_eps: config.rms_norm_eps,
        input_norm_d: norm(Norm::Input)?,
        qkv: map(&[Projection::Q, Projection::K, Projection::V])?,
        head_norms,
        o: map(&[Projection::O])?,
        mlp_norm_d: norm(Norm::Mlp)?,
        gate_up: map(&[Projection::Gate, Projection::Up])?,
        down: map(&[Projection::Down])?,
    })
}
