//! Writing a trained adapter for use elsewhere: as PEFT reads it, or merged into the base.

mod merged;
mod peft;

use std::path::Path;

pub use merged::{export_merged, merged_bytes};
pub use peft::export_peft;

use crate::error::{Error, Result};
use crate::trained::{OpenedAdapter, Trained};

/// The adapter to export into an output folder that is free.
///
/// # Errors
/// A folder that is taken or cannot be, a model without an adapter.
pub fn expect_possible<'a>(trained: &'a Trained, out: &Path) -> Result<&'a OpenedAdapter> {
    let taken = |what: String, hint: &str| Err(Error::invalid("--out", what).hint(hint));
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return taken(
            format!("{} is there already and not empty", out.display()),
            "name a new folder, or remove it first",
        );
    }
    if out.file_name().is_none() {
        return taken(format!("{} does not end in a name", out.display()), "name a new folder");
    }
    if let Some(above) = out.ancestors().skip(1).find(|above| above.exists()).filter(|above| !above.is_dir()) {
        return taken(format!("{} is a file, not a folder", above.display()), "name a new folder elsewhere");
    }
    trained.adapter.as_ref().ok_or_else(|| {
        Error::invalid(trained.base_dir.display().to_string(), "is a base model without an adapter: nothing to export")
            .hint("name a run directory or an adapter's folder")
    })
}

/// What a signal leaves of an export.
const STOPPED: &str = "nothing was exported";
