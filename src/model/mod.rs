//! The model: what it is made of, its frozen weights, the adapters on them, and the passes through it.

pub mod adapted_linear;
pub mod arch;
pub mod block;
pub mod decoder;
pub mod flops;
pub mod frozen_weight;
pub mod head_norms;
pub mod init;
pub mod kv_cache;
pub mod lora;
pub mod params;
pub mod shape;
pub mod shapes;
pub mod weights;
