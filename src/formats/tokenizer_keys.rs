//! The keys of `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `tokenizer.json`.

use super::keys::{KeyTable, harmless, honoured, refused};

/// `tokenizer_config.json`.
pub const TOKENIZER_CONFIG: KeyTable = KeyTable {
    file: "tokenizer_config.json",
    keys: &[
        honoured("added_tokens_decoder", "tokens by id, with their flags"),
        honoured("bos_token", NAMED),
        honoured("eos_token", NAMED),
        honoured("unk_token", NAMED),
        honoured("sep_token", NAMED),
        honoured("pad_token", NAMED),
        honoured("cls_token", NAMED),
        honoured("mask_token", NAMED),
        honoured("additional_special_tokens", "a list of tokens"),
        honoured("extra_special_tokens", "a list of tokens, or an object of names and tokens"),
        honoured("model_specific_special_tokens", "an object of names and tokens"),
        honoured("add_bos_token", "whether a prompt begins with the token that begins a text"),
        honoured(
            "add_eos_token",
            "an answer ends with the token in any case, a prompt never; a warning where it is on",
        ),
        honoured(
            "legacy",
            "which stretches of a text get a space before them; where it is absent: all, as Transformers 4",
        ),
        honoured("add_prefix_space", "`false`: no text gets a space before it"),
        honoured("tokenizer_class", "a warning where it is no class of Llama's kind"),
        honoured("auto_map", "a warning where it names Python code for the tokenizer, which is not run"),
        honoured("chat_template", "travels with the file; `data.template` says what a prompt is"),
        refused("split_special_tokens", "special tokens as plain text: `data.special_tokens = \"text\"` does it"),
        refused("do_lower_case", "texts in lower case"),
        refused("sp_model_kwargs", "sampling, reversed pieces, tokens around a text: unless they are off"),
        // Tokens that a class of its own looks up by name. Each is special where the vocabulary holds it.
        harmless("fill_token", "marks the gap in prompts of CodeLlama's infilling, which are not made here"),
        honoured("*_token", "a token of the model's own: special where the vocabulary holds it, else a warning"),
        harmless("pad_token_id", IDS),
        harmless("bos_token_id", IDS),
        harmless("eos_token_id", IDS),
        harmless("unk_token_id", IDS),
        harmless("suffix_first", "of CodeLlama's infilling"),
        harmless("clean_up_tokenization_spaces", DECODING),
        harmless("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", DECODING),
        harmless("spaces_between_special_tokens", DECODING),
        harmless("decode_with_prefix_space", DECODING),
        harmless("errors", DECODING),
        harmless("use_default_system_prompt", "texts come from the rows and the template"),
        harmless("default_system_prompt", "texts come from the rows and the template"),
        harmless("model_max_length", "`data.max_length` decides"),
        harmless("max_len", "`data.max_length` decides"),
        harmless("max_length", "`data.max_length` decides"),
        harmless("truncation_side", "`data.truncation` decides"),
        harmless("truncation_strategy", "`data.truncation` decides"),
        harmless("truncation", "`data.truncation` decides"),
        harmless("stride", "of texts that are cut into pieces"),
        harmless("padding", PADDING),
        harmless("padding_side", PADDING),
        harmless("pad_to_multiple_of", PADDING),
        harmless("pad_token_type_id", PADDING),
        harmless("model_input_names", CALLS),
        harmless("return_token_type_ids", CALLS),
        harmless("verbose", CALLS),
        harmless("use_fast", CALLS),
        harmless("use_legacy", "of another program"),
        harmless("from_slow", CALLS),
        harmless("trust_remote_code", "no code of the model's own is run"),
        harmless("vocab_size", "the files themselves say how many tokens there are"),
        harmless("tokenizer_file", WRITER),
        harmless("tokenizer_type", WRITER),
        harmless("vocab_file", WRITER),
        harmless("merges_file", WRITER),
        harmless("special_tokens_map_file", WRITER),
        harmless("added_tokens_file", WRITER),
        harmless("name_or_path", WRITER),
        harmless("processor_class", WRITER),
        harmless("fast_tokenizer", WRITER),
        harmless("slow_tokenizer_class", WRITER),
        harmless("device_map", WRITER),
        harmless("backend", WRITER),
        harmless("is_local", WRITER),
        harmless("local_files_only", WRITER),
        harmless("transformers_version", WRITER),
        harmless("init_inputs", WRITER),
        harmless("response_schema", "how answers are taken apart by another program"),
        harmless("response_template", "how answers are taken apart by another program"),
        harmless("chat_control_tokens", "of another program's templates"),
        harmless("tool_parser_type", "of another program"),
        harmless("_*", "notes of the program that wrote the file"),
        harmless("unsloth_*", "notes of the program that wrote the file"),
    ],
};

const NAMED: &str = "a string, or an object with flags";
const IDS: &str = "the token itself is named by the key without `_id`";
const DECODING: &str = "of decoding";
const PADDING: &str = "nothing is padded";
const CALLS: &str = "of another program's calls";
const WRITER: &str = "notes of the program that wrote the file";

/// `special_tokens_map.json`.
pub const SPECIAL_TOKENS_MAP: KeyTable = KeyTable {
    file: "special_tokens_map.json",
    keys: &[
        honoured("additional_special_tokens", "a list of tokens"),
        honoured("extra_special_tokens", "a list of tokens, or an object of names and tokens"),
        harmless("fill_token", "marks the gap in prompts of CodeLlama's infilling, which are not made here"),
        honoured("*_token", "as in tokenizer_config.json"),
    ],
};

/// `added_tokens.json`: every key is a token, and its value the id.
pub const ADDED_TOKENS: KeyTable =
    KeyTable { file: "added_tokens.json", keys: &[honoured("*", "a token of the vocabulary")] };

/// `tokenizer.json`; within it the `tokenizers` library refuses what it does not know.
pub const TOKENIZER_JSON: KeyTable = KeyTable {
    file: "tokenizer.json",
    keys: &[
        honoured("added_tokens", "with their flags"),
        honoured("normalizer", "by the `tokenizers` library"),
        honoured("pre_tokenizer", "by the `tokenizers` library"),
        honoured("post_processor", "the token that it puts before a text; a warning where it puts one behind"),
        honoured("decoder", "by the `tokenizers` library"),
        honoured("model", "by the `tokenizers` library; dropout is refused"),
        harmless("version", "of the file's format"),
        harmless("truncation", "`data.truncation` decides"),
        harmless("padding", PADDING),
    ],
};
