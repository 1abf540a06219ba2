//! How much memory a run needs, by part.

use crate::model::config::LlamaConfig;
use crate::model::lora::{LoraSpec, Projection};
use crate::model::params::Layout;

/// Bytes by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Frozen weights in the compute dtype.
    pub weights: i64,
    /// fp32 masters, gradients, two moments, and the compute copy of a half-precision run.
    pub trainable: i64,
    /// What the largest micro-batch keeps for backward.
    pub activations: i64,
}

impl Memory {
    /// All parts.
    pub fn total(&self) -> i64 {
        self.weights + self.trainable + self.activations
    }
}

/// Parameters of the frozen base, tables that are trained apart.
pub fn frozen_params(config: &LlamaConfig, lora: &LoraSpec) -> i64 {
    let d = config.hidden_size;
    let per_block: i64 = Projection::ALL.iter().map(|p| p.shape(config).iter().product::<i64>()).sum::<i64>() + 2 * d;
    let table = config.vocab_size * d;
    let frozen = crate::model::lora::Table::ALL.iter().filter(|t| !lora.trains(**t)).count() as i64;
    let tables = if config.tie_word_embeddings { frozen.min(1) } else { frozen };
    config.num_hidden_layers as i64 * per_block + d + tables * table
}

/// Estimates the memory of a run whose micro-batches hold `tokens` tokens of `element` bytes.
///
/// A block keeps, a token: its input, q, k, v, the attention's output, the middle of the residual stream, gate and up,
/// the adapters' `x Aᵀ`, and three fp32 numbers a query head; with recompute its input alone, and one block at a time
/// all of it.
pub fn memory(
    config: &LlamaConfig,
    lora: &LoraSpec,
    layout: &Layout,
    tokens: i64,
    element: i64,
    recompute: bool,
) -> Memory {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let heads = config.heads();
    let ranks = lora.r * lora.target_modules.len() as i64;
    let kept = element * (2 * d + heads.qkv_width() + heads.q_width() + 2 * f + ranks) + 4 * heads.n_heads + 8;
    let layers = config.num_hidden_layers as i64;
    let per_token = if recompute { layers * element * d + kept } else { layers * kept };
    // Master, gradient and two moments in fp32; a half-precision run reads its products from a copy.
    let bytes_per_param = 4 * 4 + if element == 4 { 0 } else { element };
    Memory {
        weights: frozen_params(config, lora) * element,
        trainable: layout.buffer_len() * bytes_per_param,
        // Two gradients of the widest tensor are alive beside what is kept.
        activations: tokens * (per_token + 2 * element * 2 * f),
    }
}
