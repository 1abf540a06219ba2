//! Shapes of known models, for measuring and planning without their files.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::arch;
use crate::model::shape::ModelShape;
use crate::ops::rope::RopeScaling;

/// The names of the known shapes, the smallest first.
pub const NAMES: [&str; 7] =
    ["tiny", "smollm2-135m", "tinyllama-1.1b", "llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-2-70b"];

/// Gives the shape of a name, or of a `config.json` or the folder that holds one; `vocab_size` overrides its own, and `allowed`
/// names keys of the file that are passed over.
///
/// # Errors
/// An unknown name that is no file either; a `config.json` at fault, as [`ModelShape::load`] says; a vocabulary out of
/// range.
pub fn open(name_or_path: &str, vocab_size: Option<i64>, allowed: &[String]) -> Result<ModelShape> {
    let path = Path::new(name_or_path);
    let mut shape = match named(name_or_path) {
        Some(shape) => shape,
        None if path.is_dir() => arch::load(path, allowed)?.config,
        None if path.is_file() => arch::read(path, allowed)?.config,
        None => {
            let what = format!("{name_or_path:?} is neither a known shape nor a file");
            return Err(Error::invalid("--shape", what)
                .hint(format!("name one of {}, or the path of a config.json", NAMES.join(", "))));
        }
    };
    if let Some(vocab_size) = vocab_size {
        if !(2..=1 << 31).contains(&vocab_size) {
            let what = format!("expected a number of rows from 2 to 2^31, found {vocab_size}");
            return Err(Error::invalid("--vocab-size", what).hint("leave it out for the shape's own"));
        }
        shape.vocab_size = vocab_size;
    }
    Ok(shape)
}

/// A known shape, in the numbers of the model's own `config.json`.
pub fn named(name: &str) -> Option<ModelShape> {
    let shape = match name {
        "tiny" => ModelShape {
            hidden_size: 64,
            intermediate_size: 176,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 512,
            max_position_embeddings: 2048,
            ..llama_2()
        },
        "smollm2-135m" => ModelShape {
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            vocab_size: 49152,
            max_position_embeddings: 8192,
            rope_theta: 100_000.0,
            tie_word_embeddings: true,
            initializer_range: 1.0 / 24.0,
            ..llama_2()
        },
        "tinyllama-1.1b" => ModelShape {
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers: 22,
            num_key_value_heads: 4,
            head_dim: 64,
            max_position_embeddings: 2048,
            ..llama_2()
        },
        "llama-2-7b" => llama_2(),
        "llama-2-13b" => ModelShape {
            hidden_size: 5120,
            intermediate_size: 13824,
            num_hidden_layers: 40,
            num_attention_heads: 40,
            num_key_value_heads: 40,
            ..llama_2()
        },
        "llama-2-70b" => ModelShape {
            hidden_size: 8192,
            intermediate_size: 28672,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            ..llama_2()
        },
        "llama-3-8b" => ModelShape {
            intermediate_size: 14336,
            num_key_value_heads: 8,
            vocab_size: 128_256,
            max_position_embeddings: 8192,
            rope_theta: 500_000.0,
            eos_token_ids: vec![128_001],
            bos_token_id: Some(128_000),
            ..llama_2()
        },
        _ => return None,
    };
    Some(shape)
}

/// Llama-2-7B; the others are told by how they differ from it.
fn llama_2() -> ModelShape {
    ModelShape {
        model_type: "llama",
        hidden_size: 4096,
        intermediate_size: 11008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        vocab_size: 32000,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 4096,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        attention_dropout: 0.0,
        initializer_range: 0.02,
        eos_token_ids: vec![2],
        bos_token_id: Some(1),
        biases: Vec::new(),
        has_head_norms: false,
    }
}
