//! `config.json` of a Hugging Face model directory, read strictly: what is not computed here is refused by name.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Fault, Result};
use crate::model::weights::other_kind;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeScaling;

/// The shape of a Llama model, in the names of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
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
    /// Standard deviation of freshly made rows.
    pub initializer_range: f64,
    /// Token ids that end a text, from `config.json` and `generation_config.json` (one or several each).
    pub eos_token_ids: Vec<u32>,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
}

impl LlamaConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// Every fault at once: a missing or malformed key, or a feature that this program does not compute.
    pub fn load(base: &Path) -> Result<Self> {
        let path = base.join("config.json");
        if let Some(other) = other_kind(base).filter(|_| !path.exists()) {
            return Err(other);
        }
        let mut config = Self::read(&path)?;
        config.eos_token_ids.extend(generation_eos(base));
        Ok(config)
    }

    /// Reads a `config.json`, whatever its name and whatever lies beside it.
    ///
    /// # Errors
    /// As [`LlamaConfig::load`].
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::invalid(&place, format!("cannot be read: {e}"))
                .hint("a base is a folder of Hugging Face's kind, with config.json and model.safetensors")
        })?;
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
            Error::invalid(&place, format!("is not a JSON object: {e}")).hint("download this file of the model again")
        })?;
        let mut reader = Reader { map: &map, place, faults: Vec::new() };
        let config = reader.config();
        if reader.faults.is_empty() { Ok(config) } else { Err(Error::Invalid(reader.faults)) }
    }

    /// The head layout of the attention.
    pub fn heads(&self) -> Heads {
        Heads { n_heads: self.num_attention_heads, n_kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }
}

/// More than any model has; a number beyond it is a slip, and costs memory before anything else can be checked.
const MOST_LAYERS: i64 = 10_000;
/// What to do about a value that no model of this kind has.
const NOT_THE_MODELS_OWN: &str = "is this the model's own config.json? Download it again";

struct Reader<'a> {
    map: &'a Map<String, Value>,
    place: String,
    faults: Vec<Fault>,
}

impl Reader<'_> {
    fn fault(&mut self, key: &str, what: impl Into<String>, hint: &str) {
        self.faults.push(Fault::new(format!("{}: {key}", self.place), what).hint(hint));
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn int(&mut self, key: &str) -> i64 {
        match self.get(key).map(|v| (v.as_i64(), v.clone())) {
            Some((Some(n), _)) if (1..=1 << 31).contains(&n) => n,
            Some((_, v)) => {
                self.fault(key, format!("expected a positive integer, found {v}"), NOT_THE_MODELS_OWN);
                1
            }
            None => {
                self.fault(key, "missing", NOT_THE_MODELS_OWN);
                1
            }
        }
    }

    fn int_or(&mut self, key: &str, default: i64) -> i64 {
        if self.get(key).is_some() { self.int(key) } else { default }
    }

    fn float_in(&mut self, map: &Map<String, Value>, key: &str, default: Option<f64>) -> f64 {
        match (map.get(key).filter(|v| !v.is_null()), default) {
            (Some(v), _) => match v.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => x,
                _ => {
                    let what = format!("expected a positive number, found {v}");
                    self.fault(key, what, NOT_THE_MODELS_OWN);
                    1.0
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.fault(key, "missing", NOT_THE_MODELS_OWN);
                1.0
            }
        }
    }

    fn bool_or_false(&mut self, key: &str) -> bool {
        match self.get(key).cloned() {
            None => false,
            Some(Value::Bool(truth)) => truth,
            Some(other) => {
                self.fault(key, format!("expected true or false, found {other}"), NOT_THE_MODELS_OWN);
                false
            }
        }
    }

    fn config(&mut self) -> LlamaConfig {
        self.refuse_other_models();
        let hidden_size = self.int("hidden_size");
        let num_attention_heads = self.int("num_attention_heads");
        let num_key_value_heads = self.int_or("num_key_value_heads", num_attention_heads);
        let head_dim = self.int_or("head_dim", hidden_size / num_attention_heads.max(1));
        if num_attention_heads % num_key_value_heads.max(1) != 0 {
            let what = format!("{num_key_value_heads} does not divide num_attention_heads = {num_attention_heads}");
            self.fault("num_key_value_heads", what, NOT_THE_MODELS_OWN);
        }
        if head_dim < 2 || head_dim % 2 != 0 {
            self.fault("head_dim", format!("expected an even width, found {head_dim}"), NOT_THE_MODELS_OWN);
        }
        let num_hidden_layers = self.int("num_hidden_layers");
        if num_hidden_layers > MOST_LAYERS {
            let what = format!("expected at most {MOST_LAYERS}, found {num_hidden_layers}");
            self.fault("num_hidden_layers", what, NOT_THE_MODELS_OWN);
        }
        let max_position_embeddings = self.int_or("max_position_embeddings", 2048);
        let (rope_theta, rope_scaling) = self.rope(max_position_embeddings);
        LlamaConfig {
            hidden_size,
            intermediate_size: self.int("intermediate_size"),
            num_hidden_layers: num_hidden_layers as usize,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: self.int("vocab_size"),
            rms_norm_eps: self.float_in(self.map, "rms_norm_eps", Some(1e-6)),
            max_position_embeddings,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: self.bool_or_false("tie_word_embeddings"),
            initializer_range: self.float_in(self.map, "initializer_range", Some(0.02)),
            eos_token_ids: token_ids(self.get("eos_token_id")),
            bos_token_id: token_ids(self.get("bos_token_id")).first().copied(),
        }
    }

    fn refuse_other_models(&mut self) {
        let model_type = self.get("model_type").and_then(Value::as_str).unwrap_or("(none)").to_string();
        if model_type != "llama" {
            let what = format!("the architecture \"{model_type}\" is not supported, only \"llama\" is");
            self.fault("model_type", what, "choose a Llama-family base: Llama 1 to 3, TinyLlama, SmolLM2, Vicuna, ...");
            return;
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.bool_or_false(key) {
                self.fault(key, "projections with a bias are not supported", "choose a base without biases");
            }
        }
        if let Some(window) = self.get("sliding_window").cloned() {
            let what = format!("sliding-window attention ({window}) is not supported");
            self.fault("sliding_window", what, "choose a base with full attention");
        }
        if let Some(quantised) = self.get("quantization_config") {
            let method = quantised.get("quant_method").unwrap_or(quantised).to_string();
            let what = format!("quantised weights ({method}) are not supported");
            self.fault("quantization_config", what, "use the original fp32, fp16 or bf16 files of this model");
        }
        if let Some(act) = self.get("hidden_act").and_then(Value::as_str).filter(|a| *a != "silu") {
            let what = format!("the activation \"{act}\" is not supported, only \"silu\" is");
            self.fault("hidden_act", what, "choose a base with the activation \"silu\"");
        }
    }

    /// Rotary settings: `rope_parameters` (newer) or `rope_theta` with `rope_scaling` (older).
    fn rope(&mut self, max_positions: i64) -> (f64, RopeScaling) {
        // Where both are given the older one counts, as in Transformers.
        let key = ["rope_scaling", "rope_parameters"].into_iter().find(|key| self.get(key).is_some());
        let key = key.unwrap_or("rope_scaling");
        let settings = match self.get(key).cloned() {
            None => Map::new(),
            Some(Value::Object(settings)) => settings,
            Some(other) => {
                self.fault(key, format!("expected an object, found {other}"), NOT_THE_MODELS_OWN);
                Map::new()
            }
        };
        let newer = self.get("rope_parameters").and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let top = self.float_in(self.map, "rope_theta", Some(newer.unwrap_or(10_000.0)));
        let theta = self.float_in(&settings, "rope_theta", Some(top));
        for map in [&settings, self.map] {
            let partial = self.float_in(map, "partial_rotary_factor", Some(1.0));
            if partial != 1.0 {
                let what = format!("heads that rotate in part ({partial}) are not supported");
                self.fault("partial_rotary_factor", what, "choose a base whose heads rotate wholly");
            }
        }
        let rope_type = settings.get("rope_type").or_else(|| settings.get("type")).filter(|t| !t.is_null());
        match rope_type.map_or(Some("default"), Value::as_str) {
            Some("default") => (theta, RopeScaling::None),
            Some("llama3") => (theta, self.llama3(key, &settings, max_positions)),
            _ => {
                let found = rope_type.unwrap_or(&Value::Null);
                let what = format!("the rotary scaling {found} is not supported, only \"default\" and \"llama3\" are");
                self.fault(key, what, "remove the entry if training stays within the original context length");
                (theta, RopeScaling::None)
            }
        }
    }

    fn llama3(&mut self, key: &str, settings: &Map<String, Value>, max_positions: i64) -> RopeScaling {
        let factor = self.float_in(settings, "factor", None);
        let low_freq_factor = self.float_in(settings, "low_freq_factor", None);
        let high_freq_factor = self.float_in(settings, "high_freq_factor", None);
        let original = self.float_in(settings, "original_max_position_embeddings", Some(max_positions as f64));
        let both_given = settings.contains_key("low_freq_factor") && settings.contains_key("high_freq_factor");
        if both_given && low_freq_factor >= high_freq_factor {
            let what =
                format!("low_freq_factor = {low_freq_factor} is not below high_freq_factor = {high_freq_factor}");
            self.fault(key, what, NOT_THE_MODELS_OWN);
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original }
    }
}

/// The ids that end a text by `generation_config.json`, which a base need not have.
fn generation_eos(base: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(base.join("generation_config.json")).unwrap_or_default();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    token_ids(value.get("eos_token_id"))
}

fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}
