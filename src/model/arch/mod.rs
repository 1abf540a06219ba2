//! The architectures that are computed, a file each: what a `config.json` says becomes a [`ModelShape`], and all the rest
//! (tensors, passes, memory, operations, export) follows from that.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Fault, Result};
use crate::formats::config_json::{ANOTHER_BASE, ConfigFile, NOT_THE_MODELS_OWN, object};
use crate::formats::keys::{Key, honoured, is_neutral, short};
use crate::formats::model_keys::{CONFIG, GENERATION_CONFIG, OTHER_ARCHITECTURES};
use crate::formats::other_formats::other_kind;
use crate::model::shape::{ModelShape, Projection};

/// An architecture: a `model_type` of `config.json`.
pub struct Architecture {
    /// The `model_type`.
    pub model_type: &'static str,
    /// The class by which Transformers computes it.
    pub class: &'static str,
    /// Models that have it, for messages.
    pub models: &'static str,
    /// Keys of `config.json` that mean more or something else to it than to the others.
    pub keys: &'static [Key],
    /// Fills in what is not the same for all.
    describe: fn(&mut ConfigFile<'_>, &mut ModelShape),
}

/// All of them.
pub const ARCHITECTURES: [&Architecture; 4] = [&llama::LLAMA, &qwen2::QWEN2, &qwen3::QWEN3, &mistral::MISTRAL];

/// A shape that was read, and what its files hold that may not be what the user means.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadShape {
    /// The shape.
    pub config: ModelShape,
    /// What is passed over.
    pub warnings: Vec<Fault>,
}

/// Reads `config.json` and `generation_config.json` of a model directory; `allowed` names keys that are passed over
/// though they might change what is computed.
///
/// # Errors
/// An architecture that is not computed; else every fault at once: a missing or malformed key, a feature that this program
/// does not compute, a number that is not known.
pub fn load(base: &Path, allowed: &[String]) -> Result<ReadShape> {
    let path = base.join(CONFIG.file);
    if let Some(other) = other_kind(base).filter(|_| !path.exists()) {
        return Err(other);
    }
    let mut read = self::read(&path, allowed)?;
    let generation = base.join(GENERATION_CONFIG.file);
    if generation.exists() || generation.is_symlink() {
        let (map, place) = object(&generation)?;
        let warnings = GENERATION_CONFIG.warnings(&map, &place);
        let mut file = ConfigFile::new(&map, place, allowed);
        let ends = file.token_ids("eos_token_id");
        read.config.eos_token_ids.extend(file.finish(ends)?.0);
        read.warnings.extend(warnings);
    }
    Ok(read)
}

/// Reads a `config.json`, whatever its name and whatever lies beside it.
///
/// # Errors
/// As [`load`].
pub fn read(path: &Path, allowed: &[String]) -> Result<ReadShape> {
    let (map, place) = object(path)?;
    let architecture = architecture(&map, &place)?;
    let mut file = ConfigFile::new(&map, place, allowed);
    let mut shape = common(&mut file, architecture);
    (architecture.describe)(&mut file, &mut shape);
    refuse_other_layers(&mut file, &shape);
    file.unknown_keys(architecture.keys);
    let (config, warnings) = file.finish(shape)?;
    Ok(ReadShape { config, warnings })
}

/// The architecture of a file. Another one is refused by its name: its other keys would only be named as missing or wrong.
fn architecture(file: &Map<String, Value>, place: &str) -> Result<&'static Architecture> {
    let found = file.get("model_type").unwrap_or(&Value::Null);
    let name = found.as_str().unwrap_or_default();
    ARCHITECTURES.into_iter().find(|known| known.model_type == name).ok_or_else(|| {
        let has = OTHER_ARCHITECTURES.iter().find(|(other, _)| *other == name);
        let has = has.map(|(_, has)| format!(" (it has {has})")).unwrap_or_default();
        let known = ARCHITECTURES.map(|known| format!("{:?}", known.model_type)).join(", ");
        let what = format!("the architecture {} is not supported{has}; those that are: {known}", short(found));
        let models = ARCHITECTURES.map(|known| known.models).join("; ");
        Error::invalid(format!("{place}: model_type"), what).hint(format!("choose a Llama-family base: {models}"))
    })
}

/// More than any model has; a number beyond it is a slip, and costs memory before anything else can be checked.
const MOST_LAYERS: i64 = 10_000;

/// What all architectures have.
fn common(file: &mut ConfigFile<'_>, architecture: &Architecture) -> ModelShape {
    refuse_what_is_not_computed(file, architecture.class);
    let hidden_size = file.int("hidden_size");
    let num_attention_heads = file.int("num_attention_heads");
    let num_key_value_heads = file.int_or("num_key_value_heads", num_attention_heads);
    let head_dim = file.int_or("head_dim", hidden_size / num_attention_heads.max(1));
    if num_attention_heads % num_key_value_heads.max(1) != 0 {
        let what = format!("{num_key_value_heads} does not divide num_attention_heads = {num_attention_heads}");
        file.fault("num_key_value_heads", what, NOT_THE_MODELS_OWN);
    }
    if head_dim < 2 || head_dim % 2 != 0 {
        file.fault("head_dim", format!("expected an even width, found {head_dim}"), NOT_THE_MODELS_OWN);
    }
    let num_hidden_layers = file.int("num_hidden_layers");
    if num_hidden_layers > MOST_LAYERS {
        let what = format!("expected at most {MOST_LAYERS}, found {num_hidden_layers}");
        file.fault("num_hidden_layers", what, NOT_THE_MODELS_OWN);
    }
    let max_position_embeddings = file.int_or("max_position_embeddings", 2048);
    let (rope_theta, rope_scaling) = file.rope(max_position_embeddings);
    ModelShape {
        model_type: architecture.model_type,
        hidden_size,
        intermediate_size: file.int("intermediate_size"),
        num_hidden_layers: num_hidden_layers as usize,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size: file.int("vocab_size"),
        rms_norm_eps: file.float_or("rms_norm_eps", 1e-6),
        max_position_embeddings,
        rope_theta,
        rope_scaling,
        tie_word_embeddings: file.bool_or_false("tie_word_embeddings"),
        attention_dropout: file.attention_dropout(),
        initializer_range: file.float_or("initializer_range", 0.02),
        eos_token_ids: file.token_ids("eos_token_id"),
        bos_token_id: file.token_ids("bos_token_id").first().copied(),
        biases: Vec::new(),
        has_head_norms: false,
        sliding_window: None,
    }
}

/// The biases on the projections of attention, as `attention_bias` says.
fn attention_biases(file: &mut ConfigFile<'_>) -> Vec<Projection> {
    let all = [Projection::Q, Projection::K, Projection::V, Projection::O];
    if file.bool_or_false("attention_bias") { all.to_vec() } else { Vec::new() }
}

/// The keys by which [`window_of_layers`] decides.
const WINDOW_OF_LAYERS: [Key; 3] = [
    honoured("use_sliding_window", "whether layers attend to a window; no text may be longer than it"),
    honoured("sliding_window", "the window, where `use_sliding_window` is on"),
    honoured("max_window_layers", "the layers from this one on have the window, where `layer_types` does not say it"),
];

/// The window of the layers that have one: from some layer on, where it is in use at all.
fn window_of_layers(file: &mut ConfigFile<'_>, n_layers: usize) -> Option<i64> {
    if !file.bool_or_false("use_sliding_window") {
        return None;
    }
    let has_window = match file.get("layer_types").and_then(Value::as_array) {
        Some(types) => types.iter().any(|kind| kind == SLIDING),
        None => file.int_or("max_window_layers", 28) < n_layers as i64,
    };
    file.int_or_null("sliding_window", 4096).filter(|_| has_window)
}

/// What `layer_types` calls a layer that attends to a window.
const SLIDING: &str = "sliding_attention";

/// Refuses layers that are not computed; those with a window are where the shape has one, for no text is longer.
fn refuse_other_layers(file: &mut ConfigFile<'_>, shape: &ModelShape) {
    let is_computed = |kind: &Value| kind == "full_attention" || (kind == SLIDING && shape.sliding_window.is_some());
    let are_computed = |types: &&Value| types.as_array().is_some_and(|types| types.iter().all(is_computed));
    if let Some(types) = file.get("layer_types").filter(|types| !are_computed(types)) {
        let what = format!("layers of other kinds than \"full_attention\" are not supported: {}", short(types));
        file.fault("layer_types", what, "choose a base with full attention");
    }
}

/// The names under which files say that their weights have fewer bits.
const QUANTISED: [&str; 3] = ["quantization_config", "quantization", "compression_config"];

/// Refuses what no architecture is computed with.
fn refuse_what_is_not_computed(file: &mut ConfigFile<'_>, class: &str) {
    let named = format!("\"{}\"", class.to_ascii_lowercase());
    if let Some(found) = file.get("architectures").filter(|a| !a.to_string().to_ascii_lowercase().contains(&named)) {
        let what = format!("names {}, and the model is computed as {class}", short(found));
        file.warn("architectures", what, "");
    }
    if file.bool_or_false("rope_interleaved") {
        file.fault("rope_interleaved", "rotation of neighbouring channels is not supported", ANOTHER_BASE);
    }
    for key in QUANTISED {
        if let Some(quantised) = file.get(key).filter(|config| !is_neutral(config)) {
            let method = short(quantised.get("quant_method").unwrap_or(quantised));
            let what = format!("quantised weights ({method}) are not supported");
            file.fault(key, what, "use the original fp32, fp16 or bf16 files of this model");
        }
    }
    // Two names of one function.
    if let Some(act) = file.get("hidden_act").filter(|act| !["silu", "swish"].iter().any(|silu| act == silu)) {
        let what = format!("the activation {} is not supported, only \"silu\" is", short(act));
        file.fault("hidden_act", what, "choose a base with the activation \"silu\"");
    }
}
