//! Checkpoints: a run's whole state in a folder that is complete or absent.
//!
//! A checkpoint is an adapter that PEFT opens as it is, with the optimizer's moments and the run's position beside it.
//! It holds nothing of the frozen base and nothing that depends on how the work was spread.

pub mod adapter_file;
pub mod folder;
pub mod load;
pub mod manifest;
pub mod retention;
pub mod save;
pub mod saver;
pub mod state;
