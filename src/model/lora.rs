//! Which weights are adapted, and by what: the names of PEFT's `adapter_config.json`.

use crate::formats::config_json::LlamaConfig;

/// The seven linear maps of a block that can carry an adapter, in the order in which they run.
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

    /// `[out_features, in_features]`.
    pub fn shape(self, config: &LlamaConfig) -> [i64; 2] {
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

/// The prefix that PEFT puts before every key of an adapter file.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// The adapters of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Rank `R`.
    pub r: i64,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Dropout on the input of `A`.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// Adapted projections, ascending.
    pub target_modules: Vec<Projection>,
    /// Tables trained whole, ascending.
    pub modules_to_save: Vec<Table>,
}

impl LoraSpec {
    /// No adapters at all: the base as it is.
    pub fn none() -> Self {
        Self {
            r: 1,
            alpha: 1.0,
            dropout: 0.0,
            use_rslora: false,
            target_modules: Vec::new(),
            modules_to_save: Vec::new(),
        }
    }

    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        if self.use_rslora { self.alpha / (self.r as f64).sqrt() } else { self.alpha / self.r as f64 }
    }

    /// Whether a table is trained.
    pub fn trains(&self, table: Table) -> bool {
        self.modules_to_save.contains(&table)
    }

    /// Whether a projection is adapted.
    pub fn adapts(&self, projection: Projection) -> bool {
        self.target_modules.contains(&projection)
    }
}
