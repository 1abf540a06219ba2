//! `config.json` of a Hugging Face model directory, read strictly: what is not computed here is refused by name.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Fault, Result, shell_quoted};
use crate::formats::json;
use crate::formats::keys::{is_neutral, passed_over, short};
use crate::formats::model_keys::{CONFIG, GENERATION_CONFIG, OTHER_ARCHITECTURES};
use crate::formats::other_formats::other_kind;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeScaling;

mod rope;

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
    /// Dropout of attention weights while the model is trained, which is not computed here.
    pub attention_dropout: f64,
    /// Standard deviation of freshly made rows.
    pub initializer_range: f64,
    /// Token ids that end a text, from `config.json` and `generation_config.json` (one or several each).
    pub eos_token_ids: Vec<u32>,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
}

/// A shape that was read, and what its files hold that may not be what the user means.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadConfig {
    /// The shape.
    pub config: LlamaConfig,
    /// What is passed over.
    pub warnings: Vec<Fault>,
}

impl LlamaConfig {
    /// Reads `config.json` and `generation_config.json` of a model directory; `allowed` names keys that are passed over
    /// though they might change what is computed.
    ///
    /// # Errors
    /// Another architecture; else every fault at once: a missing or malformed key, a feature that this program does not
    /// compute, a number that is not known.
    pub fn load(base: &Path, allowed: &[String]) -> Result<ReadConfig> {
        let path = base.join("config.json");
        if let Some(other) = other_kind(base).filter(|_| !path.exists()) {
            return Err(other);
        }
        let mut read = Self::read(&path, allowed)?;
        let generation = base.join(GENERATION_CONFIG.file);
        if generation.exists() || generation.is_symlink() {
            let (map, place) = object(&generation)?;
            let mut reader = Reader { map: &map, place, allowed, faults: Vec::new(), warnings: Vec::new() };
            read.config.eos_token_ids.extend(reader.token_ids("eos_token_id"));
            if !reader.faults.is_empty() {
                return Err(Error::Invalid(reader.faults));
            }
            read.warnings.extend(GENERATION_CONFIG.warnings(&map, &reader.place));
        }
        Ok(read)
    }

    /// Reads a `config.json`, whatever its name and whatever lies beside it.
    ///
    /// # Errors
    /// As [`LlamaConfig::load`].
    pub fn read(path: &Path, allowed: &[String]) -> Result<ReadConfig> {
        let (map, place) = object(path)?;
        let mut reader = Reader { map: &map, place, allowed, faults: Vec::new(), warnings: Vec::new() };
        reader.refuse_other_architectures();
        if !reader.faults.is_empty() {
            return Err(Error::Invalid(reader.faults));
        }
        let config = reader.config();
        reader.unknown_keys();
        match reader.faults.is_empty() {
            true => Ok(ReadConfig { config, warnings: reader.warnings }),
            false => Err(Error::Invalid(reader.faults)),
        }
    }

    /// The head layout of the attention.
    pub fn heads(&self) -> Heads {
        Heads { n_heads: self.num_attention_heads, n_kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }
}

/// Reads a file that holds a JSON object; also gives its path, for messages.
fn object(path: &Path) -> Result<(Map<String, Value>, String)> {
    let place = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| {
        Error::invalid(&place, format!("cannot be read: {e}"))
            .hint("a base is a folder of Hugging Face's kind, with config.json and model.safetensors")
    })?;
    Ok((json::object(&bytes, &place)?, place))
}

/// More than any model has; a number beyond it is a slip, and costs memory before anything else can be checked.
const MOST_LAYERS: i64 = 10_000;
/// What to do about a feature that changes every result.
const ANOTHER_BASE: &str =
    "choose another base: this is part of how the model was trained, and without it, it is another";
/// What to do about a value that no model of this kind has.
const NOT_THE_MODELS_OWN: &str = "is this the model's own config.json? Download it again";

/// The names under which files say that their weights have fewer bits.
const QUANTISED: [&str; 3] = ["quantization_config", "quantization", "compression_config"];

struct Reader<'a> {
    map: &'a Map<String, Value>,
    place: String,
    /// Keys that the user allows to be passed over.
    allowed: &'a [String],
    faults: Vec<Fault>,
    warnings: Vec<Fault>,
}

impl Reader<'_> {
    fn warn(&mut self, key: &str, what: impl Into<String>, hint: &str) {
        self.warnings.push(Fault::new(format!("{}: {key}", self.place), what).hint(hint));
    }

    /// Names the keys that are in no table: a number may be a factor of some product, so it is a fault unless allowed.
    fn unknown_keys(&mut self) {
        if !self.faults.is_empty() {
            // Those of another architecture would only hide what matters.
            return;
        }
        let map = self.map;
        for (name, value) in CONFIG.unknown(map) {
            self.unknown_key(name, value);
        }
        for name in self.allowed {
            let top = name.split('.').next().unwrap_or_default();
            let is_known = CONFIG.find(name).is_some() && name != "attention_dropout";
            if is_known || !map.contains_key(top) {
                let what = if is_known { "is a key that is known" } else { "is no key of this file" };
                self.warn(name, format!("{what}, so allowing it changes nothing"), "");
            }
        }
    }

    fn unknown_key(&mut self, name: &str, value: &Value) {
        if !holds_a_number(value) || self.allowed.iter().any(|allowed| allowed == name) {
            self.warnings.push(passed_over(&self.place, name, value));
            return;
        }
        let hint = format!(
            "if it has no effect on the model, pass it over: model.allow_config_keys = [{name:?}] in a config, \
             --allow-config-key {} for generate and export; else choose another base",
            shell_quoted(name)
        );
        self.fault(
            name,
            format!("is {}, and this key is not known here: it may change what the model computes", short(value)),
            &hint,
        );
    }

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

    /// A share from 0 up to 1. Where the user allows the key it is passed over.
    fn attention_dropout(&mut self) -> f64 {
        let key = "attention_dropout";
        let found = self.get(key).cloned().unwrap_or(Value::from(0));
        match found.as_f64().filter(|share| (0.0..1.0).contains(share)) {
            Some(share) if share > 0.0 && self.allowed.iter().any(|allowed| allowed == key) => {
                self.warn(key, format!("is {share}, and is passed over: no attention weight is dropped"), "");
                0.0
            }
            Some(share) => share,
            None => {
                self.fault(
                    key,
                    format!("expected a share from 0 up to 1, found {}", short(&found)),
                    NOT_THE_MODELS_OWN,
                );
                0.0
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
        self.refuse_what_is_not_computed();
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
            attention_dropout: self.attention_dropout(),
            initializer_range: self.float_in(self.map, "initializer_range", Some(0.02)),
            eos_token_ids: self.token_ids("eos_token_id"),
            bos_token_id: self.token_ids("bos_token_id").first().copied(),
        }
    }

    /// Refuses another architecture by its name. Its other keys would only be named as missing or wrong.
    fn refuse_other_architectures(&mut self) {
        let model_type = self.get("model_type").cloned().unwrap_or(Value::Null);
        let name = model_type.as_str().unwrap_or_default();
        if name == "llama" {
            return;
        }
        let has = OTHER_ARCHITECTURES.iter().find(|(other, _)| *other == name);
        let has = has.map(|(_, has)| format!(" (it has {has})")).unwrap_or_default();
        let what = format!("the architecture {} is not supported{has}, only \"llama\" is", short(&model_type));
        let hint = "choose a Llama-family base: Llama 1 to 3, TinyLlama, SmolLM2, Vicuna, Yi, ...";
        self.fault("model_type", what, hint);
    }

    fn refuse_what_is_not_computed(&mut self) {
        if let Some(found) =
            self.get("architectures").filter(|a| !a.to_string().to_ascii_lowercase().contains("\"llamaforcausallm\""))
        {
            let what = format!("names {}, and the model is computed as LlamaForCausalLM", short(found));
            self.warn("architectures", what, "");
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.bool_or_false(key) {
                self.fault(key, "projections with a bias are not supported", "choose a base without biases");
            }
        }
        if self.bool_or_false("rope_interleaved") {
            self.fault("rope_interleaved", "rotation of neighbouring channels is not supported", ANOTHER_BASE);
        }
        if let Some(window) = self.get("sliding_window").cloned() {
            let what = format!("sliding-window attention ({window}) is not supported");
            self.fault("sliding_window", what, "choose a base with full attention");
        }
        if let Some(types) = self.get("layer_types").filter(|types| !is_full_attention(types)) {
            let what = format!("layers of other kinds than \"full_attention\" are not supported: {}", short(types));
            self.fault("layer_types", what, "choose a base with full attention");
        }
        for key in QUANTISED {
            if let Some(quantised) = self.get(key).filter(|config| !is_neutral(config)) {
                let method = short(quantised.get("quant_method").unwrap_or(quantised));
                let what = format!("quantised weights ({method}) are not supported");
                self.fault(key, what, "use the original fp32, fp16 or bf16 files of this model");
            }
        }
        // Two names of one function.
        if let Some(act) = self.get("hidden_act").filter(|act| !["silu", "swish"].iter().any(|silu| act == silu)) {
            let what = format!("the activation {} is not supported, only \"silu\" is", short(act));
            self.fault("hidden_act", what, "choose a base with the activation \"silu\"");
        }
    }

    /// One token id or several; -1 stands for none, as older files have it.
    fn token_ids(&mut self, key: &str) -> Vec<u32> {
        let found = match self.get(key) {
            None => return Vec::new(),
            Some(Value::Array(ids)) => ids.clone(),
            Some(one) => vec![one.clone()],
        };
        let mut ids = Vec::new();
        for id in found {
            match id.as_i64() {
                Some(-1) => {}
                Some(id) if u32::try_from(id).is_ok() => ids.push(id as u32),
                _ => self.fault(
                    key,
                    format!("expected a token's number or a list of them, found {}", short(&id)),
                    NOT_THE_MODELS_OWN,
                ),
            }
        }
        ids
    }
}

/// Whether a value is a number that says something, or has one within.
fn holds_a_number(value: &Value) -> bool {
    match value {
        Value::Number(_) => !is_neutral(value),
        Value::Array(values) => values.iter().any(Value::is_number) || values.iter().any(holds_a_number),
        Value::Object(values) => values.values().any(holds_a_number),
        _ => false,
    }
}

fn is_full_attention(types: &Value) -> bool {
    types.as_array().is_some_and(|types| types.iter().all(|kind| kind == "full_attention"))
}
