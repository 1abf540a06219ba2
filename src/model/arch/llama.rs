//! Llama 1 to 3, and the many models that are computed as these.

use super::{Architecture, attention_biases};
use crate::formats::config_json::ConfigFile;
use crate::formats::keys::{honoured, short};
use crate::model::shape::{ModelShape, Projection};

pub(super) const LLAMA: Architecture = Architecture {
    model_type: "llama",
    class: "LlamaForCausalLM",
    models: "Llama 1 to 3, TinyLlama, SmolLM2, Vicuna, Yi, ...",
    keys: &[
        honoured("attention_bias", "biases on the four projections of attention"),
        honoured("mlp_bias", "biases on the three projections of the MLP"),
    ],
    describe,
};

fn describe(file: &mut ConfigFile<'_>, shape: &mut ModelShape) {
    shape.biases = attention_biases(file);
    if file.bool_or_false("mlp_bias") {
        shape.biases.extend([Projection::Gate, Projection::Up, Projection::Down]);
    }
    if let Some(window) = file.get("sliding_window") {
        let what = format!("sliding-window attention ({}) is not supported", short(window));
        file.fault("sliding_window", what, "choose a base with full attention");
    }
}
