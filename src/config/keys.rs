//! The table of keys. A key is one entry: its help, field, kind of values, default, what it means to a run, and the names
//! that other trainers have for it. The sections' structs, reading, printing, the answers to foreign names, the rules of
//! a resume and the tables of `docs/config.md` are made from it.

use std::path::PathBuf;

use super::file_kinds::{Files, Path, Template};
use super::kinds::{ABOVE_ZERO, Betas, FROM_ZERO, Kind, Named, Names, SHARE, SHARE_OR_ALL, Texts, Truth, Whole, Word};
use super::raw::Given;
use super::reader::{GivenKey, Reader};
use super::{
    Auto, Config, Device, Dtype, Meaning, NonFinite, Recompute, SAVED_MODULES, TARGET_MODULES, TemplateChoice, paths,
};
use crate::data::{Answers, LossAverage, SpecialTokens, Truncation};
use crate::engine::optim::schedule::Shape;
use crate::model::init::NewRows;

/// What is known of a key.
#[derive(Debug)]
pub struct Key {
    /// Its name, as `section.field`.
    pub name: &'static str,
    /// Its section.
    pub section: &'static str,
    /// Its name within the section.
    pub field: &'static str,
    /// What it does, in Markdown.
    pub help: &'static str,
    /// Which values there are, in Markdown.
    pub values: fn() -> String,
    /// What holds where it is not given.
    pub fallback: Fallback,
    /// What its values name.
    pub named: fn() -> Named,
    /// What a change of it means to a run that goes on.
    pub(super) meaning: Meaning,
    /// Names that other trainers have for it, parted by blanks, and what differs (empty: nothing does).
    pub(super) others: &'static [(&'static str, &'static str)],
    /// Writes its value in TOML; `None` where it is off.
    pub(super) print: fn(&Config) -> Option<String>,
    /// Takes the value that a run settled, where the config says `auto`.
    pub(super) settle: fn(&mut Config, &mut GivenKey<'_, '_>),
}

/// What holds where a key is not given.
#[derive(Debug, Clone, Copy)]
pub enum Fallback {
    /// Nothing: it must be given, such as in this example.
    Required(&'static str),
    /// This, as a `--set` would say it.
    Is(&'static str),
    /// What follows from the keys before it or from the user's environment, in words.
    Computed(&'static str),
    /// Nothing: it is off. In words.
    Off(&'static str),
}

/// Reads a key; gives `None` where it is not given or at fault and has no [`Fallback::Is`].
fn read<T, K: Kind<T>>(reader: &mut Reader<'_>, key: &'static str, kind: &K, fallback: Fallback) -> Option<T> {
    if let Fallback::Required(example) = fallback {
        reader.missing(key, example);
    }
    let found = reader.raw.get(key).cloned().and_then(|given| kind.read(&mut reader.key(key, given)));
    match fallback {
        Fallback::Is(text) => found.or_else(|| kind.read(&mut reader.key(key, Given::typed(text)))),
        _ => found,
    }
}

/// Gives the [`Fallback`] of an entry.
macro_rules! fallback {
    (Computed($words:literal, $_value:expr)) => {
        Fallback::Computed($words)
    };
    ($fallback:ident($text:literal)) => {
        Fallback::$fallback($text)
    };
}

/// Puts the fallback of an entry in place of `None`.
macro_rules! or_fallback {
    ($found:expr, Is($_text:literal)) => {
        $found.expect("every default is a value of its key: each config reads them")
    };
    ($found:expr, Computed($_words:literal, $value:expr)) => {
        $found.unwrap_or_else(|| $value)
    };
    ($found:expr, $_fallback:ident($_text:literal)) => {
        $found.unwrap_or_default()
    };
}

/// An entry is `help, field: type = kind, fallback, meaning, names of others => what differs, ...;`.
macro_rules! keys {
    ($(
        $(#[doc = $about:literal])+
        $section:ident: $config:ident {$(
            $(#[doc = $help:literal])+
            $field:ident: $type:ty = $kind:expr, $fallback:ident($($value:tt)*), $meaning:ident
            $(, $others:literal => $note:literal)*;
        )+}
    )+) => {
        $(
            $(#[doc = $about])+
            #[derive(Debug, Clone, PartialEq)]
            pub struct $config {$(
                $(#[doc = $help])+
                pub $field: $type,
            )+}

            impl $config {
                /// Reads the keys of the section in their order.
                pub(super) fn read(reader: &mut Reader<'_>) -> Self {
                    $(
                        let key = concat!(stringify!($section), ".", stringify!($field));
                        let found: Option<$type> = read(reader, key, &$kind, fallback!($fallback($($value)*)));
                        let $field = or_fallback!(found, $fallback($($value)*));
                    )+
                    Self { $($field),+ }
                }
            }
        )+

        /// The sections, in the order they are written.
        pub(super) const SECTIONS: &[&str] = &[$(stringify!($section)),+];

        /// Every key there is, section by section.
        pub static KEYS: &[Key] = &[$($(Key {
            name: concat!(stringify!($section), ".", stringify!($field)),
            section: stringify!($section),
            field: stringify!($field),
            help: concat!($($help),+),
            values: || Kind::<$type>::values(&$kind),
            fallback: fallback!($fallback($($value)*)),
            named: || Kind::<$type>::named(&$kind),
            meaning: Meaning::$meaning,
            others: &[$(($others, $note)),*],
            print: |config| Kind::<$type>::print(&$kind, &config.$section.$field),
            settle: |config, theirs| Kind::<$type>::settle(&$kind, &mut config.$section.$field, theirs),
        },)+)+];
    };
}

/// A rank beyond the width of any projection adds nothing.
const LARGEST_RANK: u64 = 1 << 16;
/// Eight times the longest context of any Llama; tables of rotations for it still fit in memory.
const LONGEST_SAMPLE: u64 = 1 << 20;
/// Tokens that a micro-batch may hold: they are counted in 32 bits.
const MOST_TOKENS: u64 = 1 << 31;
/// More updates or samples than any job has; so that products of two such numbers can be counted.
const MOST_STEPS: u64 = 1 << 40;
const MOST_SAMPLES: u64 = 1 << 30;
/// More epochs, checkpoints or gigabytes than any job has.
const MOST: u64 = 1 << 20;

keys! {
    /// `[model]`: the base model and how it is loaded.
    model: ModelConfig {
        /// The base model in Hugging Face's layout: `config.json`, `model.safetensors` or an index with its parts. Nothing
        /// is downloaded.
        base: PathBuf = Path("folder", Named::Files, paths::base), Required("base = \"models/Llama-2-7b-hf\""),
            Contents,
            "model_name_or_path model_name base_model model_path model_id model_dir pretrained_model_name_or_path \
             base_model_name_or_path pretrained_model checkpoint_dir" =>
            "a folder in Hugging Face's layout; models are not downloaded";
        /// In a folder that has both, `tokenizer.model` is taken. See [data.md](data.md).
        tokenizer: PathBuf = Path("folder, `tokenizer.json`, `.model` file", Named::Files, paths::tokenizer),
            Computed("the base's", base.clone()), Contents,
            "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_file" => "";
        /// Type of frozen weights, activations and products; what is trained is kept in fp32 as well. `auto` is bf16 on a
        /// GPU from compute capability 8.0, fp16 on an older one, fp32 on a CPU. fp16 comes with loss scaling.
        dtype: Auto<Dtype> = Word, Is("auto"), Defines,
            "bf16 fp16 torch_dtype precision mixed_precision pure_bf16 bfloat16 float16 compute_dtype \
             bnb_4bit_compute_dtype" => "\"bf16\", \"fp16\" or \"fp32\"";
        /// `auto` is a GPU where it can be used, else the CPU; `check` says which, and what is missing for a GPU whose
        /// driver is there. `cuda` is the first GPU (`CUDA_VISIBLE_DEVICES` chooses), or an error.
        device: Auto<Device> = Word, Is("auto"), Rounding, "use_cpu no_cuda device_map" =>
            "\"auto\", \"cpu\" or \"cuda\"";
        /// A PEFT adapter to start from. Its `r`, `lora_alpha`, `use_rslora`, `target_modules` and `modules_to_save` must
        /// be the config's; tables in it replace the grown ones.
        init_adapter: Option<PathBuf> = Path("folder", Named::Files, paths::adapter), Off("none"), Defines,
            "adapter_name_or_path adapter_path adapter_dir lora_model_dir lora_weights peft_path" =>
            "the folder of a PEFT adapter";
        /// Whether embedding and head may grow to the tokenizer's size. Needs both tables in `lora.modules_to_save`.
        /// Without it a tokenizer larger than the embedding is refused.
        resize_vocab: bool = Truth, Is("false"), Defines, "resize_token_embeddings resize_token_embeddings_to_32x" =>
            "true or false";
        /// What grown rows begin as: random with the base's `initializer_range`, or the mean of the old rows.
        new_rows: NewRows = Word, Is("normal"), Defines;
        /// Keys of the base's `config.json` that are passed over though they might change what the model computes: numbers
        /// that are not known here, and `attention_dropout`. See [compat.md](compat.md).
        allow_config_keys: Vec<String> = Texts, Is("[]"), Free;
    }

    /// `[lora]`: which weights are adapted and how, in the names of PEFT.
    lora: LoraConfig {
        /// Rank.
        r: usize = Whole(1..=LARGEST_RANK), Is("64"), Defines, "lora_r lora_rank rank" => "";
        /// The adapters' part is scaled by `alpha / r`.
        alpha: f64 = ABOVE_ZERO, Is("128"), Defines, "lora_alpha" => "";
        /// Share of the adapters' input channels zeroed in training, in steps of 1/65536.
        dropout: f64 = SHARE, Is("0.05"), Defines, "lora_dropout" => "";
        /// Any of `q_proj` `k_proj` `v_proj` `o_proj` `gate_proj` `up_proj` `down_proj`.
        target_modules: Vec<String> = Names(&TARGET_MODULES, Some("leave it out for all seven projections")),
            Computed("all seven", TARGET_MODULES.map(str::to_owned).to_vec()), Defines,
            "lora_target lora_target_modules trainable lora_target_linear lora_attn_modules apply_lora_to_mlp \
             lora_layers keys" => "a list such as [\"q_proj\", \"v_proj\"]; leave it out for all seven projections";
        /// Tables trained whole: `embed_tokens`, `lm_head`. On a tied base each gets a copy of its own.
        modules_to_save: Vec<String> = Names(&SAVED_MODULES, None), Is("[]"), Defines,
            "additional_target lora_modules_to_save additional_trainable_modules apply_lora_to_output" =>
            "any of [\"embed_tokens\", \"lm_head\"]";
        /// Scale by `alpha / sqrt(r)`.
        use_rslora: bool = Truth, Is("false"), Defines, "rslora lora_use_rslora peft_use_rslora" => "true or false";
    }

    /// `[data]`: the samples and how they become tokens.
    data: DataConfig {
        /// JSON lines or arrays; the files of a glob in alphabetical order, each file once. See
        /// [data.md](data.md#files-and-rows).
        train: Vec<PathBuf> = Files, Required("train = [\"data/train.jsonl\"]"), Contents,
            "dataset datasets dataset_path dataset_name dataset_dir data_path data_files train_file train_files \
             train_data train_dataset training_data data" => "the paths of files or globs";
        /// Rows for the evaluation loss.
        validation: Vec<PathBuf> = Files, Is("[]"), Free,
            "eval_dataset validation_file validation_files test_datasets val_file eval_file val_data" =>
            "the paths of files or globs";
        /// Or a share of the training samples, drawn by the seed and not trained on.
        validation_fraction: f64 = SHARE, Is("0"), Defines,
            "val_size val_set_size validation_split test_size validation_split_percentage" =>
            "a share: 0.05 is 5 percent of the samples";
        /// The text around question and answer: built in, the chat template of the tokenizer's own folder, or a file. See
        /// [data.md](data.md#templates).
        template: TemplateChoice = Template, Is("alpaca"), Contents,
            "prompt_template prompt_style chat_template conversation_template" =>
            "\"alpaca\", \"chinese-alpaca\", \"chat\" or the path of a template file";
        /// Which answers of a conversation are learned: the last, or every one. `auto` is every one with a chat template, else the
        /// last.
        learn: Auto<Answers> = Word, Is("auto"), Defines, "mask_history roles_to_train" => "\"auto\", \"last\" or \"all\"";
        /// Tokens of a sample at most.
        // The first token of a sample is never learned, so that a sample of one token has no use.
        max_length: usize = Whole(2..=LONGEST_SAMPLE), Is("512"), Defines,
            "cutoff_len max_seq_length max_seq_len max_sequence_length sequence_len sequence_length seq_len \
             seq_length model_max_length block_size context_length" => "in tokens";
        /// A longer sample is left out and counted, loses its end, or makes the data an error.
        truncation: Truncation = Word, Is("drop"), Defines;
        /// Whether a special token written in a row's text (`</s>`) becomes that token or stays text.
        special_tokens: SpecialTokens = Word, Is("special"), Defines;
        /// A new seeded order every epoch, or file order.
        shuffle: bool = Truth, Is("true"), Defines, "shuffle_dataset disable_shuffling shuffle_merged_datasets" =>
            "true or false";
        /// Rows that cannot be used and are passed over; one more is an error. A file that cannot be read to its end is an
        /// error in any case.
        max_bad_rows: u64 = Whole(0..=MOST_STEPS), Is("0"), Free;
        /// Where tokens are kept between runs.
        cache_dir: PathBuf = Path("folder", Named::Place, paths::absolute),
            Computed("`$XDG_CACHE_HOME/bellora`, else `~/.cache/bellora`", paths::user_cache_dir()), Free,
            "dataset_prepared_path data_cache_dir cache_path tokenized_path" => "";
        /// What everything in that folder may take, in GB (10⁹ bytes). Where new tokens take more, those that were unused
        /// for longest are deleted.
        cache_max_gb: u64 = Whole(1..=MOST), Is("50"), Free;
    }

    /// `[train]`: the updates, and what is written when.
    train: TrainConfig {
        /// The run folder. One that holds a run is refused, but for `--resume`.
        output: PathBuf = Path("folder", Named::Place, paths::absolute), Required("output = \"runs/first\""), Free,
            "output_dir save_path save_dir" => "the run directory";
        /// Passes over the samples; the last update of each may be short.
        epochs: u32 = Whole(1..=MOST), Is("1"), Length, "num_train_epochs num_epochs n_epochs max_epochs" =>
            "a whole number";
        /// Or a number of updates; they may span epochs.
        max_steps: Option<u64> = Whole(1..=MOST_STEPS), Off(""), Length,
            "max_train_steps num_steps total_steps iters max_iters" => "";
        /// Samples of an update.
        global_batch: usize = Whole(1..=MOST_SAMPLES), Is("64"), Defines,
            "per_device_train_batch_size gradient_accumulation_steps micro_batch_size batch_size train_batch_size \
             per_gpu_train_batch_size" =>
            "it counts the samples of one update over all devices: their micro-batch size x accumulation steps x \
             devices; train.micro_batch_tokens bounds the memory";
        /// Tokens that go through the model at once, at least `data.max_length`; the rest is accumulated. Bounds memory and
        /// does not change the result beyond rounding. `auto` is 4096, or `max_length` if that is more.
        micro_batch_tokens: Auto<usize> = Whole(1..=MOST_TOKENS), Is("auto"), Rounding,
            "per_device_eval_batch_size eval_batch_size" => "it bounds the tokens of a micro-batch, in evaluation too";
        /// The peak.
        learning_rate: f64 = ABOVE_ZERO, Is("4e-4"), Defines, "lr max_lr peak_lr" => "";
        /// After the warmup: to 0 by half a cosine or a line, or level.
        schedule: Shape = Word, Is("cosine"), Defines,
            "lr_scheduler_type lr_scheduler lr_schedule scheduler lr_decay_style" =>
            "\"cosine\", \"linear\" or \"constant\"";
        /// Share of the updates, rounded up, in which the rate rises from 0.
        warmup_ratio: f64 = SHARE_OR_ALL, Is("0.001"), Defines, "warmup lr_warmup_ratio" => "or train.warmup_steps";
        /// Or a number of updates.
        warmup_steps: Option<u64> = Whole(0..=MOST_STEPS), Off(""), Defines, "num_warmup_steps warmup_iters" => "";
        /// AdamW's, decoupled.
        weight_decay: f64 = FROM_ZERO, Is("0"), Defines;
        /// AdamW's.
        betas: [f64; 2] = Betas, Is("[0.9, 0.999]"), Defines, "adam_beta1 adam_beta2 beta1 beta2" =>
            "both in one list: [0.9, 0.999]";
        /// AdamW's.
        eps: f64 = ABOVE_ZERO, Is("1e-8"), Defines, "adam_epsilon adam_eps epsilon" => "";
        /// Largest L2 norm of the gradient; 0 does not clip.
        max_grad_norm: f64 = FROM_ZERO, Is("1"), Defines, "max_norm gradient_clipping clip_grad_norm grad_clip" =>
            "0 does not clip";
        /// Mean over the label tokens of an update; or over groups of `loss_group_samples` samples of each group's own mean
        /// (which is what a trainer with such micro-batches does).
        loss_average: LossAverage = Word, Is("tokens"), Defines;
        /// For `samples`. A group with nothing to learn does not count.
        loss_group_samples: usize = Whole(1..=MOST_SAMPLES), Is("1"), Defines;
        /// Of order, dropout, new weights and the held-out share.
        seed: u64 = Whole(0..=i64::MAX as u64), Is("42"), Defines, "random_seed data_seed" => "";
        /// Whether a layer's activations are computed again in backward: less memory, more time. `auto` is `none` on a CPU.
        recompute: Auto<Recompute> = Word, Is("auto"), Rounding,
            "gradient_checkpointing use_gradient_checkpointing grad_checkpoint activation_checkpointing \
             enable_activation_checkpointing" => "\"auto\", \"none\" or \"all\"";
        /// With several ranks: whether each keeps a part of the optimizer's state only (ZeRO-1), see
        /// [ranks.md](ranks.md#a-sharded-optimizer). `auto` does so where a GPU's memory asks for it, and not on CPUs.
        shard: Auto<bool> = Truth, Is("auto"), Rounding, "deepspeed fsdp fsdp_config deepspeed_config zero_stage" =>
            "\"auto\", true or false: whether ranks share the optimizer's state out (ZeRO-1)";
        /// On a GPU: only ops whose sums have a fixed order, so that runs and resumes are the same bit for bit on the same
        /// GPU and libraries. Slower, and attention's backward takes more memory. A CPU is so anyway, with the same number
        /// of threads.
        deterministic: bool = Truth, Is("false"), Rounding, "full_determinism use_deterministic_algorithms" =>
            "true or false";
        /// What follows a loss or gradient that is NaN or infinite where no loss scale can mend it. Either way the update is
        /// not applied, and its samples stand with their own losses in `RUN/non_finite-step-*.jsonl`. `stop` ends the run;
        /// `skip` passes over the update, with a warning.
        non_finite: NonFinite = Word, Is("stop"), Free,
            "terminate_on_nan check_for_nan_in_loss_and_grad skip_nan_loss" => "\"stop\" or \"skip\"";
        /// For `skip`: so many updates of the run at most, resumed or not; one more ends it.
        max_non_finite: u64 = Whole(1..=MOST_STEPS), Is("10"), Free;
        /// Updates between checkpoints, and one after the last; 0: none but on Ctrl-C and SIGUSR1.
        checkpoint_every: u64 = Whole(0..=MOST_STEPS), Is("200"), Free,
            "save_steps save_every save_interval steps_per_save save_strategy saves_per_epoch" =>
            "in updates; 0 is never";
        /// How many of the newest stay.
        keep_checkpoints: usize = Whole(1..=MOST), Is("3"), Free, "save_total_limit max_checkpoints" =>
            "at least 1";
        /// How many of those with the lowest evaluation loss stay besides. Needs validation samples, and a
        /// `checkpoint_every` that is a multiple of `eval_every`.
        keep_best: usize = Whole(0..=MOST), Is("0"), Free;
        /// Updates after which a checkpoint is written in any case, and stays.
        keep_steps: Vec<u64> = Whole(1..=MOST_STEPS), Is("[]"), Free;
        /// Updates between evaluations, and one after the last; 0: none.
        eval_every: u64 = Whole(0..=MOST_STEPS), Computed("as `checkpoint_every`", checkpoint_every), Free,
            "eval_steps eval_strategy evaluation_strategy evals_per_epoch steps_per_eval val_interval eval_interval" =>
            "in updates; 0 is never";
        /// Updates between lines on the console and in `train.log`, and points of TensorBoard. `metrics.jsonl` has every
        /// update.
        log_every: u64 = Whole(0..=MOST_STEPS), Is("1"), Free,
            "logging_steps log_every_n_steps steps_per_report log_interval" => "in updates; 0 is never";
        /// Type of the trained tables in the final `adapter/`. LoRA weights and checkpoints are fp32.
        save_dtype: Dtype = Word, Is("fp32"), Free;
    }
}
