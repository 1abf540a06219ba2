//! What to answer when a key, section or value is not one of ours: the names that users of other trainers bring along
//! (LLaMA-Factory, axolotl, Unsloth, Transformers, PEFT, TRL, torchtune, mlx-lm), and spelling mistakes.

use super::{Faults, SECTIONS, known_keys};
use crate::error::Fault;

/// What a name of another trainer is here.
enum Here {
    /// A key, and what differs (empty: nothing does).
    Key(&'static str, &'static str),
    /// No key, and why.
    Absent(&'static str),
}

use Here::{Absent, Key};

const BASE: &str = "a folder in Hugging Face's layout; models are not downloaded";
const DTYPE: &str = "\"bf16\", \"fp16\" or \"fp32\"";
const ADAPTER: &str = "the folder of a PEFT adapter";
const SEVEN: &str = "a list such as [\"q_proj\", \"v_proj\"]; leave it out for all seven projections";
const TABLES: &str = "any of [\"embed_tokens\", \"lm_head\"]";
const FILES: &str = "the paths of files or globs";
const SHARE: &str = "a share: 0.05 is 5 percent of the samples";
const TEMPLATE: &str = "\"alpaca\", \"chinese-alpaca\" or the path of a template file";
const BATCH: &str = "it counts the samples of one update over all devices: \
                     their micro-batch size x accumulation steps x devices; train.micro_batch_tokens bounds the memory";
const EVAL_BATCH: &str = "it bounds the tokens of a micro-batch, in evaluation too";
const SCHEDULES: &str = "\"cosine\", \"linear\" or \"constant\"";
const RECOMPUTE: &str = "\"auto\", \"none\" or \"all\"";
const NON_FINITE: &str = "\"stop\" or \"skip\"";
const IN_UPDATES: &str = "in updates; 0 is never";

const NOT_QUANTISED: &str = "leave it out: quantised bases are not supported; \
                             model.dtype = \"bf16\" or \"fp16\" halves the memory of fp32";
const ATTENTION: &str = "leave it out: the program chooses the attention kernel";
const ONLY_LORA: &str = "leave it out: LoRA is the only method";
const PACKED: &str = "leave it out: samples are always packed without padding, and never see each other";
const LEARNED: &str = "leave it out: the answer is learned and the prompt is not";
const FIXED_OPTIMIZER: &str = "the optimizer is always AdamW; train.betas, train.eps and train.weight_decay set it";
const RESUME: &str = "leave it out, and run `bellora resume RUN_DIR` or `bellora train CONFIG --resume`";
const SHARD: &str = "\"auto\", true or false: whether ranks share the optimizer's state out (ZeRO-1)";
const LOGS: &str = "leave it out: metrics.jsonl and TensorBoard files are always written to train.output";
const NOT_HIDDEN: &str =
    "leave it out: a loss that is not finite is always shown, and train.non_finite says what follows";
const NOT_SUPPORTED: &str = "not supported: leave it out";
const NOT_NEEDED: &str = "not needed: leave it out";

/// The table, by the part of the config its answers are in; names are parted by blanks.
#[rustfmt::skip]
const NAMES: &[(&str, Here)] = &[
    // [model]
    ("model_name_or_path model_name base_model model_path model_id model_dir", Key("model.base", BASE)),
    ("pretrained_model_name_or_path base_model_name_or_path", Key("model.base", BASE)),
    ("pretrained_model checkpoint_dir", Key("model.base", BASE)),
    ("tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_file", Key("model.tokenizer", "")),
    ("bf16 fp16 torch_dtype precision mixed_precision pure_bf16 bfloat16 float16", Key("model.dtype", DTYPE)),
    ("compute_dtype bnb_4bit_compute_dtype", Key("model.dtype", DTYPE)),
    ("use_cpu no_cuda device_map", Key("model.device", "\"auto\", \"cpu\" or \"cuda\"")),
    ("adapter_name_or_path adapter_path adapter_dir", Key("model.init_adapter", ADAPTER)),
    ("lora_model_dir lora_weights peft_path", Key("model.init_adapter", ADAPTER)),
    ("resize_token_embeddings resize_token_embeddings_to_32x", Key("model.resize_vocab", "true or false")),
    ("load_in_4bit load_in_8bit quantization quantization_bit quantization_config", Absent(NOT_QUANTISED)),
    ("bnb_4bit_quant_type bnb_4bit_use_double_quant quantize_base use_qlora gptq", Absent(NOT_QUANTISED)),
    ("flash_attention flash_attn use_flash_attn attn_implementation", Absent(ATTENTION)),
    ("use_flash_attention_2 sdp_attention xformers_attention shift_attn", Absent(ATTENTION)),
    ("trust_remote_code", Absent("not needed: no Python code of a model is ever run")),
    ("use_fast_tokenizer tokenizer_type model_type torch_compile use_liger_kernel", Absent(NOT_NEEDED)),
    ("rope_scaling rope_theta", Absent("leave it out: rotary embeddings are computed as the base's config.json says")),
    // [lora]
    ("lora_r lora_rank rank", Key("lora.r", "")),
    ("lora_alpha", Key("lora.alpha", "")),
    ("lora_dropout", Key("lora.dropout", "")),
    ("lora_target lora_target_modules trainable lora_target_linear", Key("lora.target_modules", SEVEN)),
    ("lora_attn_modules apply_lora_to_mlp lora_layers keys", Key("lora.target_modules", SEVEN)),
    ("additional_target lora_modules_to_save", Key("lora.modules_to_save", TABLES)),
    ("additional_trainable_modules apply_lora_to_output", Key("lora.modules_to_save", TABLES)),
    ("rslora lora_use_rslora peft_use_rslora", Key("lora.use_rslora", "true or false")),
    ("use_dora lora_use_dora peft_use_dora loraplus_lr_ratio pissa_init", Absent(NOT_SUPPORTED)),
    ("lora_bias bias fan_in_fan_out", Absent("leave it out: adapters have no bias of their own")),
    ("finetuning_type adapter peft_type task_type fine_tune_type stage do_train", Absent(ONLY_LORA)),
    ("layers_to_transform num_layers freeze_trainable_layers", Absent("not supported: every layer is adapted")),
    // [data]
    ("dataset datasets dataset_path dataset_name dataset_dir", Key("data.train", FILES)),
    ("data_path data_files train_file train_files train_data", Key("data.train", FILES)),
    ("train_dataset training_data data", Key("data.train", FILES)),
    ("eval_dataset validation_file validation_files test_datasets", Key("data.validation", FILES)),
    ("val_file eval_file val_data", Key("data.validation", FILES)),
    ("val_size val_set_size validation_split test_size", Key("data.validation_fraction", SHARE)),
    ("validation_split_percentage", Key("data.validation_fraction", SHARE)),
    ("cutoff_len max_seq_length max_seq_len max_sequence_length", Key("data.max_length", "in tokens")),
    ("sequence_len sequence_length seq_len seq_length", Key("data.max_length", "in tokens")),
    ("model_max_length block_size context_length", Key("data.max_length", "in tokens")),
    ("prompt_template prompt_style chat_template conversation_template", Key("data.template", TEMPLATE)),
    ("dataset_prepared_path data_cache_dir cache_path tokenized_path", Key("data.cache_dir", "")),
    ("shuffle_dataset disable_shuffling shuffle_merged_datasets", Key("data.shuffle", "true or false")),
    ("sample_packing packing neat_packing group_by_length eval_sample_packing", Absent(PACKED)),
    ("pad_to_sequence_len pad_to_max_length", Absent(PACKED)),
    ("train_on_inputs train_on_prompt train_on_input mask_prompt mask_inputs", Absent(LEARNED)),
    ("assistant_only_loss completion_only_loss mask_history", Absent(LEARNED)),
    ("overwrite_cache", Absent("leave it out: tokens are made anew whenever data, tokenizer or template have changed")),
    ("preprocessing_num_workers dataset_num_proc dataset_processes", Absent(NOT_NEEDED)),
    ("dataloader_num_workers dataloader_pin_memory remove_unused_columns", Absent(NOT_NEEDED)),
    ("max_samples max_train_samples dataset_text_field", Absent(NOT_SUPPORTED)),
    // [train]
    ("output_dir save_path save_dir", Key("train.output", "the run directory")),
    ("num_train_epochs num_epochs n_epochs max_epochs", Key("train.epochs", "a whole number")),
    ("max_train_steps num_steps total_steps iters max_iters", Key("train.max_steps", "")),
    ("per_device_train_batch_size gradient_accumulation_steps", Key("train.global_batch", BATCH)),
    ("micro_batch_size batch_size train_batch_size per_gpu_train_batch_size", Key("train.global_batch", BATCH)),
    ("per_device_eval_batch_size eval_batch_size", Key("train.micro_batch_tokens", EVAL_BATCH)),
    ("lr max_lr peak_lr", Key("train.learning_rate", "")),
    ("lr_scheduler_type lr_scheduler lr_schedule scheduler lr_decay_style", Key("train.schedule", SCHEDULES)),
    ("num_warmup_steps warmup_iters", Key("train.warmup_steps", "")),
    ("warmup lr_warmup_ratio", Key("train.warmup_ratio", "or train.warmup_steps")),
    ("adam_beta1 adam_beta2 beta1 beta2", Key("train.betas", "both in one list: [0.9, 0.999]")),
    ("adam_epsilon adam_eps epsilon", Key("train.eps", "")),
    ("optim optimizer optimizer_type optim_args", Absent(FIXED_OPTIMIZER)),
    ("max_norm gradient_clipping clip_grad_norm grad_clip", Key("train.max_grad_norm", "0 does not clip")),
    ("gradient_checkpointing use_gradient_checkpointing grad_checkpoint", Key("train.recompute", RECOMPUTE)),
    ("activation_checkpointing enable_activation_checkpointing", Key("train.recompute", RECOMPUTE)),
    ("save_steps save_every save_interval steps_per_save", Key("train.checkpoint_every", IN_UPDATES)),
    ("save_strategy saves_per_epoch", Key("train.checkpoint_every", IN_UPDATES)),
    ("save_total_limit max_checkpoints", Key("train.keep_checkpoints", "at least 1")),
    ("eval_steps eval_strategy evaluation_strategy evals_per_epoch", Key("train.eval_every", IN_UPDATES)),
    ("steps_per_eval val_interval eval_interval", Key("train.eval_every", IN_UPDATES)),
    ("logging_steps log_every_n_steps steps_per_report log_interval", Key("train.log_every", IN_UPDATES)),
    ("terminate_on_nan check_for_nan_in_loss_and_grad skip_nan_loss", Key("train.non_finite", NON_FINITE)),
    ("logging_nan_inf_filter", Absent(NOT_HIDDEN)),
    ("random_seed data_seed", Key("train.seed", "")),
    ("full_determinism use_deterministic_algorithms", Key("train.deterministic", "true or false")),
    ("resume_from_checkpoint auto_resume_from_checkpoints resume", Absent(RESUME)),
    ("overwrite_output_dir", Absent("leave it out: a finished run is never overwritten; name another train.output")),
    ("deepspeed fsdp fsdp_config deepspeed_config zero_stage", Key("train.shard", SHARD)),
    ("ddp_find_unused_parameters", Absent(NOT_NEEDED)),
    ("report_to logging_dir use_wandb wandb_project run_name plot_loss", Absent(LOGS)),
    ("metric_logger logging_strategy", Absent(LOGS)),
    ("push_to_hub hub_model_id", Absent("not supported: upload the run's adapter/ folder yourself")),
    ("save_safetensors save_only_model", Absent(NOT_NEEDED)),
    ("label_smoothing_factor label_smoothing neftune_noise_alpha", Absent(NOT_SUPPORTED)),
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
        (Some(key), _) => (belongs(key), Some(key)),
        (None, Some(Key(key, ""))) => (format!("use {key}"), Some(*key)),
        (None, Some(Key(key, note))) => (format!("use {key}: {note}"), Some(*key)),
        (None, Some(Absent(why))) => ((*why).to_owned(), None),
        (None, None) => match nearest(section, &plain) {
            Some(key) => (format!("did you mean {key}?"), Some(key)),
            None => (all_keys(section), None),
        },
    };
    faults.proposed.extend(proposed);
    let what = if section.is_empty() { "unknown key outside of any section" } else { "unknown key" };
    faults.add(line, Fault::new(place, what).hint(hint));
}

/// Gives the section that an unknown section's name stands for.
pub(super) fn meant_section(name: &str) -> Option<&'static str> {
    let plain = normalise(name);
    let foreign = SECTION_NAMES.iter().find(|(names, _)| is_among(&plain, names)).map(|(_, section)| *section);
    foreign.or_else(|| SECTIONS.into_iter().find(|section| strsim::damerau_levenshtein(section, &plain) <= 1))
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
fn own_elsewhere(section: &str, plain: &str) -> Option<&'static str> {
    let named = |key: &&'static str| key.split_once('.').is_some_and(|(_, name)| name == plain);
    let in_section = known_keys().filter(named).find(|key| key.split_once('.').is_some_and(|(of, _)| of == section));
    in_section.or_else(|| known_keys().find(named))
}

fn belongs(key: &'static str) -> String {
    match key.split_once('.') {
        Some((section, name)) => format!("write {name} under [{section}]: {key}"),
        None => format!("use {key}"),
    }
}

/// Whether a name is one of those in a row of the tables, which are parted by blanks.
fn is_among(name: &str, names: &str) -> bool {
    names.split(' ').any(|one| one == name)
}

fn foreign(plain: &str) -> Option<&'static Here> {
    NAMES.iter().find(|(names, _)| is_among(plain, names)).map(|(_, here)| here)
}

/// Finds the key whose name is spelt most alike; of equals one in the same section.
fn nearest(section: &str, plain: &str) -> Option<&'static str> {
    let candidates = known_keys().filter_map(|key| {
        let (of, name) = key.split_once('.')?;
        Some((strsim::damerau_levenshtein(name, plain), of != section, key))
    });
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

fn all_keys(section: &str) -> String {
    let names: Vec<_> = known_keys().filter_map(|key| key.split_once('.')).filter(|(of, _)| *of == section).collect();
    if names.is_empty() {
        return "every key stands in one of [model], [lora], [data] and [train]".to_owned();
    }
    let names: Vec<_> = names.into_iter().map(|(_, name)| name).collect();
    format!("the keys of [{section}] are: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_foreign_name_is_answered_once_and_by_a_key_that_exists() {
        let mut seen = BTreeSet::new();
        for (names, here) in NAMES {
            for name in names.split(' ') {
                assert!(seen.insert(name), "{name} stands twice");
                assert_eq!(normalise(name), name, "{name} can never be found");
            }
            if let Key(key, _) = here {
                assert!(known_keys().any(|known| known == *key), "{names:?} lead to {key}, which does not exist");
            }
        }
        for (names, section) in SECTION_NAMES {
            assert!(SECTIONS.contains(section), "{names:?} lead to [{section}], which does not exist");
        }
        for (key, words, _) in VALUES {
            assert!(known_keys().any(|known| known == *key), "{words:?} are said of {key}, which does not exist");
        }
    }
}
