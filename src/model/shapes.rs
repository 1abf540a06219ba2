//! Shapes of known models, for measuring and planning without their files.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::arch;
use crate::model::shape::{ModelShape, Projection};
use crate::ops::rope::RopeScaling;

/// The names of the known shapes, the smallest first.
pub const NAMES: [&str; 21] = [
    "tiny",
    "smollm2-135m",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "tinyllama-1.1b",
    "qwen2.5-1.5b",
    "qwen3-1.7b",
    "qwen3-4b",
    "llama-2-7b",
    "mistral-7b",
    "qwen2.5-7b",
    "llama-3-8b",
    "llama-3.1-8b",
    "qwen3-8b",
    "llama-2-13b",
    "qwen2.5-14b",
    "qwen3-14b",
    "qwen3-32b",
    "qwen2.5-32b",
    "llama-2-70b",
    "qwen2.5-72b",
];

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
        "llama-3-8b" => llama_3(),
        "llama-3.1-8b" => ModelShape {
            max_position_embeddings: 131_072,
            rope_scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192.0,
            },
            ..llama_3()
        },
        "mistral-7b" => ModelShape {
            model_type: "mistral",
            intermediate_size: 14336,
            num_key_value_heads: 8,
            vocab_size: 32768,
            max_position_embeddings: 32768,
            rope_theta: 1e6,
            ..llama_2()
        },
        "qwen2.5-0.5b" => ModelShape {
            vocab_size: 151_936,
            max_position_embeddings: 32768,
            head_dim: 64,
            tie_word_embeddings: true,
            ..qwen_2_5(896, 4864, 24, [14, 2])
        },
        "qwen2.5-1.5b" => {
            ModelShape { vocab_size: 151_936, tie_word_embeddings: true, ..qwen_2_5(1536, 8960, 28, [12, 2]) }
        }
        "qwen2.5-7b" => qwen_2_5(3584, 18944, 28, [28, 4]),
        "qwen2.5-14b" => qwen_2_5(5120, 13824, 48, [40, 8]),
        "qwen2.5-32b" => qwen_2_5(5120, 27648, 64, [40, 8]),
        "qwen2.5-72b" => qwen_2_5(8192, 29568, 80, [64, 8]),
        "qwen3-0.6b" => ModelShape { tie_word_embeddings: true, ..qwen_3(1024, 3072, 28, [16, 8]) },
        "qwen3-1.7b" => ModelShape { tie_word_embeddings: true, ..qwen_3(2048, 6144, 28, [16, 8]) },
        "qwen3-4b" => ModelShape { tie_word_embeddings: true, ..qwen_3(2560, 9728, 36, [32, 8]) },
        "qwen3-8b" => qwen_3(4096, 12288, 36, [32, 8]),
        "qwen3-14b" => qwen_3(5120, 17408, 40, [40, 8]),
        "qwen3-32b" => qwen_3(5120, 25600, 64, [64, 8]),
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
        sliding_window: None,
    }
}

/// Llama-3-8B.
fn llama_3() -> ModelShape {
    ModelShape {
        intermediate_size: 14336,
        num_key_value_heads: 8,
        vocab_size: 128_256,
        max_position_embeddings: 8192,
        rope_theta: 500_000.0,
        eos_token_ids: vec![128_001],
        bos_token_id: Some(128_000),
        ..llama_2()
    }
}

/// A Qwen2.5: widths, layers, heads of queries and of keys.
fn qwen_2_5(hidden_size: i64, intermediate_size: i64, layers: usize, [n_heads, n_kv_heads]: [i64; 2]) -> ModelShape {
    ModelShape {
        model_type: "qwen2",
        hidden_size,
        intermediate_size,
        num_hidden_layers: layers,
        num_attention_heads: n_heads,
        num_key_value_heads: n_kv_heads,
        vocab_size: 152_064,
        rms_norm_eps: 1e-6,
        max_position_embeddings: 131_072,
        rope_theta: 1e6,
        eos_token_ids: vec![151_643],
        bos_token_id: Some(151_643),
        biases: vec![Projection::Q, Projection::K, Projection::V],
        ..llama_2()
    }
}

/// A Qwen3, as [`qwen_2_5`].
fn qwen_3(hidden_size: i64, intermediate_size: i64, layers: usize, heads: [i64; 2]) -> ModelShape {
    ModelShape {
        model_type: "qwen3",
        vocab_size: 151_936,
        max_position_embeddings: 40960,
        eos_token_ids: vec![151_645, 151_643],
        biases: Vec::new(),
        has_head_norms: true,
        ..qwen_2_5(hidden_size, intermediate_size, layers, heads)
    }
}
