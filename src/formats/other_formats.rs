//! What a directory holds that is no base in safetensors, and the way from there to one.

use std::path::Path;

use crate::error::Error;

/// Says what lies in a directory that holds no safetensors model, and what to do about it.
pub(super) fn no_weights(dir: &Path) -> Error {
    other_kind(dir).unwrap_or_else(|| {
        let hint = match names(dir).iter().any(|name| name.ends_with(".safetensors")) {
            true => "its parts need their index: download it too, or name a single file model.safetensors",
            false => "a base is a folder of Hugging Face's kind; are all its files downloaded?",
        };
        Error::invalid(dir.display().to_string(), "has neither model.safetensors nor model.safetensors.index.json")
            .hint(hint)
    })
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Names the kind of a directory that holds a model of another form, with the way to a form that is read.
pub fn other_kind(dir: &Path) -> Option<Error> {
    let names = names(dir);
    let has = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    let (what, hint) = if has(&|n| n.starts_with("pytorch_model") && n.contains(".bin")) {
        (
            "holds pytorch_model.bin (a Python pickle), which is not read",
            "convert it once: python3 -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('DIR', dtype='auto').save_pretrained('OUT', safe_serialization=True)\"",
        )
    } else if has(&|n| n.ends_with(".gguf")) {
        (
            "holds a GGUF file (quantised for llama.cpp), which is not read",
            "use the original safetensors files of this model",
        )
    } else if has(&|n| n == "adapter_config.json") {
        (
            "is an adapter, not a base model",
            "model.base is the model it was trained on; to start from the adapter, set model.init_adapter to this folder",
        )
    } else if has(&|n| n.starts_with("consolidated") || n == "params.json") {
        (
            "holds Meta's original files, which are not read",
            "use the Hugging Face form of the model (config.json, model-00001-of-....safetensors)",
        )
    } else if has(&|n| n == "snapshots") {
        (
            "is a folder of the Hugging Face cache, not a model",
            "name the folder below snapshots/ that holds config.json",
        )
    } else if has(&|n| n == "config.toml") {
        ("is a run directory, not a base model", "export it first: bellora export RUN_DIR --format merged --out DIR")
    } else if has(&|n| n == "tf_model.h5" || n == "flax_model.msgpack" || n.ends_with(".onnx")) {
        ("holds weights of TensorFlow, Flax or ONNX, which are not read", "use the safetensors files of this model")
    } else {
        return None;
    };
    Some(Error::invalid(dir.display().to_string(), what).hint(hint))
}
