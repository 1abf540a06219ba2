//! Llama 1 to 3, and the many models that are computed as these.

use super::Architecture;
use crate::formats::config_json::ConfigFile;
use crate::formats::keys::short;
use crate::model::shape::ModelShape;

pub(super) const LLAMA: Architecture = Architecture {
    model_type: "llama",
    class: "LlamaForCausalLM",
    models: "Llama 1 to 3, TinyLlama, SmolLM2, Vicuna, Yi, ...",
    keys: &[],
    describe,
};

fn describe(file: &mut ConfigFile<'_>, _: &mut ModelShape) {
    for key in ["attention_bias", "mlp_bias"] {
        if file.bool_or_false(key) {
            file.fault(key, "projections with a bias are not supported", "choose a base without biases");
        }
    }
    if let Some(window) = file.get("sliding_window") {
        let what = format!("sliding-window attention ({}) is not supported", short(window));
        file.fault("sliding_window", what, "choose a base with full attention");
    }
}
