//! Bellora fine-tunes Llama-family language models with LoRA on libtorch.
//!
//! The modules in reading order; each imports only from layers below its own and from those before it in its own.
//! `ARCHITECTURE.md` holds the map.

pub mod choice;
pub mod device;
pub mod disk;
pub mod error;
pub mod progress;
pub mod torch;

pub mod comm;
pub mod formats;
pub mod ops;

pub mod batch;

pub mod data;
pub mod model;

pub mod engine;

pub mod checkpoint;

pub mod config;
pub mod log;
pub mod plan;

pub mod eval;
pub mod run;

pub mod bench;

pub mod generate;
pub mod trained;

pub mod export;

pub mod selftest;

pub mod cli;
