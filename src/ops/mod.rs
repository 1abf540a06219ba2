//! The operations of a Llama block: each with its explicit backward beneath its forward.
//!
//! Legend of axes: `N` packed tokens, `D` hidden, `F` feed-forward, `H` heads, `K` KV heads, `E` head width,
//! `V` vocabulary, `R` LoRA rank. `dx` is the gradient of `x`. Ops take numbers and tensors, never
//! configs; where an op has several forms, a [`target::Target`] says which.

pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub mod target;
