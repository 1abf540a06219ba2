//! The Llama model: its configuration, its frozen weights, the adapters on them, and the passes through it.

pub mod adapted_linear;
pub mod adapter_file;
pub mod block;
pub mod config;
pub mod flops;
pub mod init;
pub mod kv_cache;
pub mod llama;
pub mod lora;
mod other_formats;
pub mod params;
pub mod shapes;
pub mod tensor_file_out;
mod tensor_read;
pub mod weights;
