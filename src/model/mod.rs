//! The Llama model: its frozen weights, the adapters on them, and the passes through it.

pub mod adapted_linear;
pub mod block;
pub mod flops;
pub mod frozen_weight;
pub mod init;
pub mod kv_cache;
pub mod llama;
pub mod lora;
pub mod params;
pub mod shapes;
pub mod weights;
