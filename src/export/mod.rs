//! Writing a trained adapter for use elsewhere: as PEFT reads it, or merged into the base.

mod merged;
mod peft;

use std::path::Path;

pub use merged::export_merged;
pub use peft::export_peft;

use crate::error::{Error, Result};
use crate::trained::{OpenedAdapter, Trained};

/// The adapter to export, and an output folder that is free.
fn checked<'a>(trained: &'a Trained, out: &Path) -> Result<&'a OpenedAdapter> {
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return Err(Error::invalid("--out", format!("{} is there already and not empty", out.display()))
            .hint("name a new folder, or remove it first"));
    }
    trained.adapter.as_ref().ok_or_else(|| {
        Error::invalid(trained.base_dir.display().to_string(), "is a base model without an adapter: nothing to export")
            .hint("name a run directory or an adapter's folder")
    })
}
