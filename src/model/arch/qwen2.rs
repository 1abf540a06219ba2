//! Qwen1.5, Qwen2 and Qwen2.5: a Llama with biases on the projections of queries, keys and values.

use super::{Architecture, WINDOW_OF_LAYERS, window_of_layers};
use crate::formats::config_json::ConfigFile;
use crate::model::shape::{ModelShape, Projection};

pub(super) const QWEN2: Architecture = Architecture {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    models: "Qwen1.5, Qwen2, Qwen2.5",
    keys: &WINDOW_OF_LAYERS,
    describe,
};

fn describe(file: &mut ConfigFile<'_>, shape: &mut ModelShape) {
    file.required(&["num_key_value_heads", "max_position_embeddings"]);
    shape.biases = vec![Projection::Q, Projection::K, Projection::V];
    shape.sliding_window = window_of_layers(file, shape.num_hidden_layers);
}
