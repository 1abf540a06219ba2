//! Mistral 7B and its kin: a Llama whose attention may be to a window.

use super::Architecture;
use crate::formats::config_json::ConfigFile;
use crate::formats::keys::honoured;
use crate::model::shape::ModelShape;

pub(super) const MISTRAL: Architecture = Architecture {
    model_type: "mistral",
    class: "MistralForCausalLM",
    models: "Mistral 7B",
    keys: &[honoured(
        "sliding_window",
        "4096 where it is absent, full attention where it is null; no text may be longer",
    )],
    describe,
};

/// The window of a file that does not speak of it.
const WINDOW: i64 = 4096;

fn describe(file: &mut ConfigFile<'_>, shape: &mut ModelShape) {
    file.required(&["num_key_value_heads", "max_position_embeddings"]);
    shape.sliding_window = file.int_or_null("sliding_window", WINDOW);
}
