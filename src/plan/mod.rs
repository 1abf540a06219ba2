//! What a run needs before it is started: memory by part, the largest micro-batch, time, disk.
//!
//! `dry_run` is the engine's step with bytes in place of tensors; `memory` asks it for the peak; `solve` turns it round,
//! from bytes to tokens; `estimate` adds time and disk for the GPUs that `gpus` knows.

mod dry_run;
pub mod estimate;
pub mod gpus;
pub mod memory;
pub mod solve;

pub use memory::{MemoryModel, Part, PartBytes, Stage};
pub use solve::Solved;

/// Bytes in GiB, as people read them.
pub fn gib(bytes: i64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)) }
}
