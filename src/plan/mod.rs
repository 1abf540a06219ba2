//! What a run needs before it is started: memory by part, the largest micro-batch, time, disk.
//!
//! `dry_run` is the engine's step with bytes in place of tensors; `memory` asks it for the peak; `solve` turns it round,
//! from bytes to tokens; `estimate` adds time and disk for the GPUs that `gpus` knows.

mod dry_run;
pub mod estimate;
mod fit;
pub mod gpus;
pub mod memory;
pub mod parts;
pub mod solve;

pub use fit::{expect_to_fit, gib};
pub use memory::MemoryModel;
pub use parts::{MemoryPart, PartBytes, Stage};
pub use solve::Solved;
