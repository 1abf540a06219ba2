//! What a model is made of: its numbers, its projections and tables, and the tensors that its files hold.

use crate::error::Fault;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeScaling;

/// The shape of a model, in the names of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// The architecture's name.
    pub model_type: &'static str,
    /// `D`.
    pub hidden_size: i64,
    /// `F`.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// `H`.
    pub num_attention_heads: i64,
    /// `K`; divides `H`.
    pub num_key_value_heads: i64,
    /// `E`.
    pub head_dim: i64,
    /// `V` of the files, before any growth.
    pub vocab_size: i64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// The longest sequence of pre-training.
    pub max_position_embeddings: i64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretch of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Dropout of attention weights while the model is trained, which is not computed here.
    pub attention_dropout: f64,
    /// Standard deviation of freshly made rows.
    pub initializer_range: f64,
    /// Token ids that end a text, from `config.json` and `generation_config.json` (one or several each).
    pub eos_token_ids: Vec<u32>,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
    /// The projections that add a bias.
    pub biases: Vec<Projection>,
    /// Whether each head of queries and keys is normed before it is rotated: one weight `[E]` for all heads of the queries of
    /// a block, and one for those of its keys.
    pub has_head_norms: bool,
    /// How many tokens back a layer attends, itself included, where that is bounded. It is not computed: no text may be longer.
    pub sliding_window: Option<i64>,
}

impl ModelShape {
    /// Why texts of so many tokens cannot be computed, if they cannot; `config` is the path of `config.json`.
    pub fn refuse_longer_than_window(&self, longest: i64, config: &str) -> Option<Fault> {
        let window = self.sliding_window.filter(|window| *window < longest)?;
        let what = format!("is {window}, and texts may have {longest} tokens: attention to a window is not supported");
        Some(Fault::new(format!("{config}: sliding_window"), what).hint(format!(
            "texts of up to {window} tokens are computed in full: lower data.max_length, or the number of new tokens"
        )))
    }

    /// The head layout of the attention.
    pub fn heads(&self) -> Heads {
        Heads { n_heads: self.num_attention_heads, n_kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// Every tensor of the model's files with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let d = self.hidden_size;
        let tables = if self.tie_word_embeddings { &Table::ALL[..1] } else { &Table::ALL[..] };
        let mut all: Vec<_> =
            tables.iter().map(|table| (table.base_key().to_owned(), vec![self.vocab_size, d])).collect();
        all.push((FINAL_NORM.to_owned(), vec![d]));
        for layer in 0..self.num_hidden_layers {
            all.extend(
                Norm::ALL
                    .into_iter()
                    .filter(|norm| norm.is_in(self))
                    .map(|norm| (norm.key(layer), vec![norm.width(self)])),
            );
            for projection in Projection::ALL {
                let [outputs, inputs] = projection.shape(self);
                all.push((projection.weight(layer), vec![outputs, inputs]));
                if self.biases.contains(&projection) {
                    all.push((projection.bias(layer), vec![outputs]));
                }
            }
        }
        all
    }
}

/// The key of the weight of the norm behind the last block.
pub const FINAL_NORM: &str = "model.norm.weight";

/// The norms of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// Before attention.
    Input,
    /// Before the MLP.
    Mlp,
    /// Of each head of the queries.
    Queries,
    /// Of each head of the keys.
    Keys,
}

impl Norm {
    const ALL: [Self; 4] = [Self::Input, Self::Mlp, Self::Queries, Self::Keys];

    fn is_in(self, shape: &ModelShape) -> bool {
        matches!(self, Self::Input | Self::Mlp) || shape.has_head_norms
    }

    /// Elements of its weight.
    pub fn width(self, shape: &ModelShape) -> i64 {
        if matches!(self, Self::Input | Self::Mlp) { shape.hidden_size } else { shape.head_dim }
    }

    /// The key of its weight in a model file.
    pub fn key(self, layer: usize) -> String {
        let name = match self {
            Self::Input => "input_layernorm",
            Self::Mlp => "post_attention_layernorm",
            Self::Queries => "self_attn.q_norm",
            Self::Keys => "self_attn.k_norm",
        };
        format!("model.layers.{layer}.{name}.weight")
    }
}

/// The seven linear maps of a block, each of which can carry an adapter, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl Projection {
    /// All seven, in order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The name as `target_modules` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Reads a name of `target_modules`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }

    /// The path of the module within the model: `model.layers.3.self_attn.q_proj`.
    pub fn module(self, layer: usize) -> String {
        let part = if self <= Self::O { "self_attn" } else { "mlp" };
        format!("model.layers.{layer}.{part}.{}", self.name())
    }

    /// The key of its weight in a model file.
    pub fn weight(self, layer: usize) -> String {
        format!("{}.weight", self.module(layer))
    }

    /// The key of its bias in a model file.
    pub fn bias(self, layer: usize) -> String {
        format!("{}.bias", self.module(layer))
    }

    /// `[out_features, in_features]`.
    pub fn shape(self, config: &ModelShape) -> [i64; 2] {
        let heads = config.heads();
        match self {
            Self::Q => [heads.q_width(), config.hidden_size],
            Self::K | Self::V => [heads.kv_width(), config.hidden_size],
            Self::O => [config.hidden_size, heads.q_width()],
            Self::Gate | Self::Up => [config.intermediate_size, config.hidden_size],
            Self::Down => [config.hidden_size, config.intermediate_size],
        }
    }
}

/// A table that can be trained whole beside the adapters (PEFT's `modules_to_save`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// `embed_tokens`.
    Embed,
    /// `lm_head`.
    Head,
}

impl Table {
    /// Both, in the order of the flat buffer.
    pub const ALL: [Self; 2] = [Self::Embed, Self::Head];

    /// The name as `modules_to_save` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed_tokens",
            Self::Head => "lm_head",
        }
    }

    /// Reads a name of `modules_to_save`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The key of its weight in a model file.
    pub fn base_key(self) -> &'static str {
        match self {
            Self::Embed => "model.embed_tokens.weight",
            Self::Head => "lm_head.weight",
        }
    }
}
