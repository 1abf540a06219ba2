//! What tells the base and the samples of a run from others, so that a run that goes on is held against them.

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::state::{BaseIdentity, Identity};
use crate::data::Dataset;
use crate::formats::safetensors_in::TensorFiles;
use crate::model::shape::ModelShape;
use crate::ops::rope::RopeScaling;
use crate::run::setup::{Job, ModelSetup};

impl Job {
    /// What the run reads.
    pub fn identity(&self) -> Identity {
        Identity {
            base: BaseIdentity::Named(named(&self.model.base, &self.model.files)),
            data: sum_of_samples(&self.train),
            validation: self.validation.as_ref().map(sum_of_samples),
        }
    }
}

impl ModelSetup {
    /// What differs between this base and the one of a checkpoint, in words; nothing where they are the same.
    pub(super) fn other_base(&self, theirs: &BaseIdentity) -> Option<String> {
        if let BaseIdentity::Sum(theirs) = theirs {
            let is_it = sums_of_format_2(&self.base, &self.files).contains(theirs);
            return (!is_it).then(|| "its checksum is another".to_owned());
        }
        let ours = BaseIdentity::Named(named(&self.base, &self.files));
        let differences = ours.differences(theirs)?;
        let shown = differences.iter().map(|(name, ours, theirs)| match name.as_str() {
            TENSORS => "its tensors are others".to_owned(),
            name => format!("{name} is {ours} here and was {theirs}"),
        });
        (!differences.is_empty()).then(|| shown.collect::<Vec<_>>().join(", "))
    }
}

/// The name of the tensors' checksum among the named values.
const TENSORS: &str = "tensors";

/// The values that decide what a base computes. What only says where a text ends, or how long one may be, is left out.
fn named(base: &ModelShape, files: &TensorFiles) -> Map<String, Value> {
    let ModelShape {
        model_type,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size,
        rms_norm_eps,
        rope_theta,
        rope_scaling,
        tie_word_embeddings,
        initializer_range,
        max_position_embeddings: _,
        attention_dropout: _,
        eos_token_ids: _,
        bos_token_id: _,
        // Both follow from the architecture and the tensors.
        biases: _,
        has_head_norms: _,
        // No text is longer than that.
        sliding_window: _,
    } = base;
    let rope_scaling = match rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    };
    let values = [
        ("model_type", json!(model_type)),
        ("hidden_size", json!(hidden_size)),
        ("intermediate_size", json!(intermediate_size)),
        ("num_hidden_layers", json!(num_hidden_layers)),
        ("num_attention_heads", json!(num_attention_heads)),
        ("num_key_value_heads", json!(num_key_value_heads)),
        ("head_dim", json!(head_dim)),
        ("vocab_size", json!(vocab_size)),
        ("rms_norm_eps", json!(rms_norm_eps)),
        ("rope_theta", json!(rope_theta)),
        ("rope_scaling", rope_scaling),
        ("tie_word_embeddings", json!(tie_word_embeddings)),
        ("initializer_range", json!(initializer_range)),
        (TENSORS, json!(files.fingerprint())),
    ];
    values.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The checksums that a checkpoint of format 2 may have of this base. They depend on the ends of a text as well, those of
/// `config.json` first; a `generation_config.json` may have come since.
fn sums_of_format_2(base: &ModelShape, files: &TensorFiles) -> Vec<String> {
    let rope_scaling = match base.rope_scaling {
        RopeScaling::None => "None".to_owned(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => format!(
            "Llama3 {{ factor: {factor:?}, low_freq_factor: {low_freq_factor:?}, high_freq_factor: {high_freq_factor:?}, \
             original_max_position_embeddings: {original_max_position_embeddings:?} }}"
        ),
    };
    let tensors = files.fingerprint();
    let sum = |ends: &[u32]| {
        let shape = format!(
            "LlamaConfig {{ hidden_size: {}, intermediate_size: {}, num_hidden_layers: {}, num_attention_heads: {}, \
             num_key_value_heads: {}, head_dim: {}, vocab_size: {}, rms_norm_eps: {:?}, max_position_embeddings: {}, \
             rope_theta: {:?}, rope_scaling: {rope_scaling}, tie_word_embeddings: {}, initializer_range: {:?}, \
             eos_token_ids: {ends:?}, bos_token_id: {:?} }}",
            base.hidden_size,
            base.intermediate_size,
            base.num_hidden_layers,
            base.num_attention_heads,
            base.num_key_value_heads,
            base.head_dim,
            base.vocab_size,
            base.rms_norm_eps,
            base.max_position_embeddings,
            base.rope_theta,
            base.tie_word_embeddings,
            base.initializer_range,
            base.bos_token_id,
        );
        let mut hasher = Xxh3::new();
        hasher.update(shape.as_bytes());
        hasher.update(tensors.as_bytes());
        format!("{:032x}", hasher.digest128())
    };
    (0..=base.eos_token_ids.len()).map(|n| sum(&base.eos_token_ids[..n])).collect()
}

fn sum_of_samples(samples: &Dataset) -> String {
    let mut hasher = Xxh3::new();
    for sample in 0..samples.len() {
        let n_tokens = samples.ids(sample).len();
        // One span up to the end is told by its start alone, as it was when there was no other kind.
        let mut spans = samples.spans(sample);
        let first = spans.next().unwrap_or(n_tokens..n_tokens);
        hasher.update(&(first.start as u64).to_le_bytes());
        if first.end != n_tokens || spans.clone().next().is_some() {
            for end in std::iter::once(first.end).chain(spans.flat_map(|span| [span.start, span.end])) {
                hasher.update(&(end as u64).to_le_bytes());
            }
        }
        hasher.update(&(n_tokens as u64).to_le_bytes());
        for id in samples.ids(sample) {
            hasher.update(&id.to_le_bytes());
        }
    }
    format!("{:032x}", hasher.digest128())
}
