//! Qwen3, dense: a Llama that norms each head of queries and keys before it is rotated.

use super::{Architecture, WINDOW_OF_LAYERS, attention_biases, window_of_layers};
use crate::formats::config_json::ConfigFile;
use crate::formats::keys::{Key, honoured};
use crate::model::shape::ModelShape;

pub(super) const QWEN3: Architecture = Architecture {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    models: "Qwen3 (dense)",
    keys: &{
        let [use_window, window, layers] = WINDOW_OF_LAYERS;
        [use_window, window, layers, BIASES]
    },
    describe,
};

const BIASES: Key = honoured("attention_bias", "biases on the four projections of attention");

fn describe(file: &mut ConfigFile<'_>, shape: &mut ModelShape) {
    file.required(&["num_key_value_heads", "head_dim", "max_position_embeddings"]);
    shape.has_head_norms = true;
    shape.biases = attention_biases(file);
    shape.sliding_window = window_of_layers(file, shape.num_hidden_layers);
}
