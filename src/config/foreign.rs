//! What to answer when a key, section or value is not one of ours: the names that users of other trainers bring along
//! (LLaMA-Factory, axolotl, Unsloth, Transformers, PEFT, TRL, torchtune, mlx-lm), and spelling mistakes.

use super::{Faults, KEYS, Key, SECTIONS};
use crate::error::Fault;

/// Names of other trainers that are no key here, and what to do about them; names are parted by blanks.
#[rustfmt::skip]
const ABSENT: &[(&str, &str)] = &[
    ("load_in_4bit load_in_8bit quantization quantization_bit quantization_config bnb_4bit_quant_type \
      bnb_4bit_use_double_quant quantize_base use_qlora gptq",
     "leave it out: quantised bases are not supported; model.dtype = \"bf16\" or \"fp16\" halves the memory of fp32"),
    ("flash_attention flash_attn use_flash_attn attn_implementation use_flash_attention_2 sdp_attention \
      xformers_attention shift_attn", "leave it out: the program chooses the attention kernel"),
    ("trust_remote_code", "not needed: no Python code of a model is ever run"),
    ("use_fast_tokenizer tokenizer_type model_type torch_compile use_liger_kernel preprocessing_num_workers \
      dataset_num_proc dataset_processes dataloader_num_workers dataloader_pin_memory remove_unused_columns \
      ddp_find_unused_parameters save_safetensors save_only_model", "not needed: leave it out"),
    ("rope_scaling rope_theta", "leave it out: rotary embeddings are computed as the base's config.json says"),
    ("use_dora lora_use_dora peft_use_dora loraplus_lr_ratio pissa_init max_samples max_train_samples \
      dataset_text_field label_smoothing_factor label_smoothing neftune_noise_alpha", "not supported: leave it out"),
    ("lora_bias bias fan_in_fan_out", "leave it out: adapters have no bias of their own"),
    ("finetuning_type adapter peft_type task_type fine_tune_type stage do_train",
     "leave it out: LoRA is the only method"),
    ("layers_to_transform num_layers freeze_trainable_layers", "not supported: every layer is adapted"),
    ("sample_packing packing neat_packing group_by_length eval_sample_packing pad_to_sequence_len pad_to_max_length",
     "leave it out: samples are always packed without padding, and never see each other"),
    ("train_on_inputs train_on_prompt train_on_input mask_prompt mask_inputs assistant_only_loss completion_only_loss \
     ", "leave it out: the answer is learned and the prompt is not"),
    ("overwrite_cache", "leave it out: tokens are made anew whenever data, tokenizer or template have changed"),
    ("optim optimizer optimizer_type optim_args",
     "the optimizer is always AdamW; train.betas, train.eps and train.weight_decay set it"),
    ("logging_nan_inf_filter",
     "leave it out: a loss that is not finite is always shown, and train.non_finite says what follows"),
    ("resume_from_checkpoint auto_resume_from_checkpoints resume",
     "leave it out, and run `bellora resume RUN_DIR` or `bellora train CONFIG --resume`"),
    ("overwrite_output_dir", "leave it out: a finished run is never overwritten; name another train.output"),
    ("report_to logging_dir use_wandb wandb_project run_name plot_loss metric_logger logging_strategy",
     "leave it out: metrics.jsonl and TensorBoard files are always written to train.output"),
    ("push_to_hub hub_model_id", "not supported: upload the run's adapter/ folder yourself"),
];

/// Section names of other trainers.
#[rustfmt::skip]
const SECTION_NAMES: &[(&str, &str)] = &[
    ("training trainer training_args training_arguments train_args hyperparameters", "train"),
    ("optimizer optim scheduler lr_scheduler checkpoint logging output run", "train"),
    ("dataset datasets data_args data_arguments dataloader", "data"),
    ("peft peft_config lora_config lora_parameters adapter", "lora"),
    ("model_args model_arguments base base_model tokenizer", "model"),
];

/// Words of other trainers for our values: the key, their word, what to write.
#[rustfmt::skip]
const VALUES: &[(&str, &str, &str)] = &[
    ("model.dtype", "bfloat16 torch.bfloat16", "\"bf16\""),
    ("model.dtype", "float16 half torch.float16", "\"fp16\""),
    ("model.dtype", "float32 float torch.float32 full", "\"fp32\""),
    ("model.dtype", "int8 int4 nf4 fp4 4bit 8bit", "another type: quantised bases are not supported"),
    ("train.save_dtype", "bfloat16", "\"bf16\""),
    ("train.save_dtype", "float16 half", "\"fp16\""),
    ("train.save_dtype", "float32 float", "\"fp32\""),
    ("model.device", "gpu cuda:0 cuda:1", "\"cuda\""),
    ("model.device", "mps xpu npu rocm tpu", "\"cpu\": of accelerators only NVIDIA's are supported"),
    ("train.schedule", "constant_with_warmup", "\"constant\": a warmup is part of every schedule"),
    ("train.schedule", "cosine_with_restarts cosine_with_min_lr polynomial inverse_sqrt", "\"cosine\""),
    ("train.recompute", "true full unsloth", "\"all\""),
    ("train.recompute", "false", "\"none\""),
    ("data.template", "chatml qwen qwen3 llama3 mistral zephyr vicuna gemma phi", "\"chat\" for the tokenizer's own chat template, or the path of a template file"),
    ("lora.target_modules", "all-linear all all_linear", "nothing: leave it out for all seven projections"),
    ("lora.target_modules", "qkv_proj w_pack query_key_value c_attn", "\"q_proj\", \"k_proj\", \"v_proj\""),
    ("lora.target_modules", "gate_up_proj", "\"gate_proj\", \"up_proj\""),
    ("lora.target_modules", "wq query", "\"q_proj\""),
    ("lora.target_modules", "wk key", "\"k_proj\""),
    ("lora.target_modules", "wv value", "\"v_proj\""),
    ("lora.target_modules", "wo dense out_proj output_proj", "\"o_proj\""),
    ("lora.target_modules", "w1 w2 w3 mlp", "\"gate_proj\", \"down_proj\", \"up_proj\""),
    ("lora.target_modules", "embed_tokens lm_head", "it in lora.modules_to_save: tables are trained whole"),
    ("lora.modules_to_save", "embeddings wte tok_embeddings embedding", "\"embed_tokens\""),
    ("lora.modules_to_save", "output head embed_out", "\"lm_head\""),
    ("lora.modules_to_save", "norm input_layernorm", "another name: norms are not trained"),
];

/// Adds the fault of a key that does not exist, with what to write instead. `section` is one of ours, or empty.
pub(super) fn unknown_key(place: String, line: usize, section: &str, name: &str, faults: &mut Faults) {
    let plain = normalise(name);
    let (hint, proposed) = match (own_elsewhere(section, &plain), foreign(&plain)) {
        (Some(Key { name, section, field, .. }), _) => {
            (format!("write {field} under [{section}]: {name}"), Some(*name))
        }
        (None, Some((key, note))) => (format!("use {key}{}{note}", if note.is_empty() { "" } else { ": " }), Some(key)),
        (None, None) => match (answer(&plain, ABSENT), nearest(section, &plain)) {
            (Some(why), _) => (why.to_owned(), None),
            (None, Some(key)) => (format!("did you mean {key}?"), Some(key)),
            (None, None) => (all_keys(section), None),
        },
    };
    faults.proposed.extend(proposed);
    let what = if section.is_empty() { "unknown key outside of any section" } else { "unknown key" };
    faults.add(line, Fault::new(place, what).hint(hint));
}

/// Gives the section that an unknown section's name stands for.
pub(super) fn meant_section(name: &str) -> Option<&'static str> {
    let plain = normalise(name);
    let is_near = |section: &&&str| strsim::damerau_levenshtein(section, &plain) <= 1;
    answer(&plain, SECTION_NAMES).or_else(|| SECTIONS.iter().find(is_near).copied())
}

/// Says what to write instead of a value that is none of `words`.
pub(super) fn value_hint(key: &str, found: &str, words: &[&str]) -> Option<String> {
    let plain = found.trim().to_lowercase();
    if let Some((.., write)) = VALUES.iter().find(|(of, theirs, _)| *of == key && is_among(&plain, theirs)) {
        return Some(format!("write {write}"));
    }
    let near = words.iter().map(|word| (strsim::damerau_levenshtein(word, &plain), word)).min()?;
    (near.0 <= allowed_distance(&plain)).then(|| format!("did you mean \"{}\"?", near.1))
}

fn normalise(name: &str) -> String {
    name.trim().trim_start_matches("--").to_lowercase().replace('-', "_")
}

/// Finds a key of that very name: in another section, or spelt with other dashes and capitals.
fn own_elsewhere(section: &str, plain: &str) -> Option<&'static Key> {
    let named = || KEYS.iter().filter(|key| key.field == plain);
    named().find(|key| key.section == section).or_else(|| named().next())
}

/// Whether a name is one of those in a row of the tables, which are parted by blanks.
fn is_among(name: &str, names: &str) -> bool {
    names.split(' ').any(|one| one == name)
}

/// Finds what a table says of a name.
fn answer(name: &str, table: &[(&'static str, &'static str)]) -> Option<&'static str> {
    table.iter().find(|(names, _)| is_among(name, names)).map(|(_, answer)| *answer)
}

/// Finds the key that another trainer calls so, and what differs.
fn foreign(plain: &str) -> Option<(&'static str, &'static str)> {
    KEYS.iter().find_map(|key| Some((key.name, answer(plain, key.others)?)))
}

/// Finds the key whose name is spelt most alike; of equals one in the same section.
fn nearest(section: &str, plain: &str) -> Option<&'static str> {
    let distance = |key: &Key| strsim::damerau_levenshtein(key.field, plain);
    let candidates = KEYS.iter().map(|key| (distance(key), key.section != section, key.name));
    let (distance, _, key) = candidates.min()?;
    (distance <= allowed_distance(plain)).then_some(key)
}

/// Gives how many slips of the finger a word of this length is allowed.
fn allowed_distance(word: &str) -> usize {
    match word.chars().count() {
        0..=2 => 0,
        3..=5 => 1,
        6..=8 => 2,
        _ => 3,
    }
}

/// Names the keys of a section, those that define a run first.
fn all_keys(section: &str) -> String {
    let mut keys: Vec<_> = KEYS.iter().filter(|key| key.section == section).collect();
    if keys.is_empty() {
        return "every key stands in one of [model], [lora], [data] and [train]".to_owned();
    }
    keys.sort_by_key(|key| key.meaning);
    let names: Vec<_> = keys.into_iter().map(|key| key.field).collect();
    format!("the keys of [{section}] are: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::find;
    use super::*;

    #[test]
    fn every_foreign_name_is_answered_once_and_by_a_key_that_exists() {
        let mut seen = BTreeSet::new();
        for (names, _) in KEYS.iter().flat_map(|key| key.others).chain(ABSENT) {
            for name in names.split(' ') {
                assert!(seen.insert(name), "{name} stands twice");
                assert_eq!(normalise(name), name, "{name} can never be found");
                assert!(own_elsewhere("", name).is_none(), "{name} is a key of ours");
            }
        }
        assert!(seen.len() > 200, "{seen:?}");
        for (names, section) in SECTION_NAMES {
            assert!(SECTIONS.contains(section), "{names:?} lead to [{section}], which does not exist");
        }
        for (key, words, _) in VALUES {
            assert!(find(key).is_some(), "{words:?} are said of {key}, which does not exist");
        }
    }
}
