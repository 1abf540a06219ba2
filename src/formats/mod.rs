//! Files of Hugging Face's kind: tables of what of each is honoured, what is known to have no effect here, and what is refused;
//! `config.json` by its table, and safetensors in and out.

pub mod config_json;
pub mod json;
pub mod keys;
pub mod model_keys;
pub mod other_formats;
pub mod safetensors_in;
pub mod safetensors_out;
mod tensor_read;
pub mod tokenizer_keys;
