//! The adapter as PEFT reads it.

use std::path::Path;
use std::sync::atomic::AtomicUsize;

use crate::checkpoint::adapter_file::{AdapterConfig, CONFIG_FILE};
use crate::checkpoint::folder::write_whole;
use crate::checkpoint::manifest::MANIFEST_FILE;
use crate::checkpoint::save::OPTIMIZER_FILE;
use crate::checkpoint::state::STATE_FILE;
use crate::disk::LocalDisk;
use crate::error::{Error, Result, not_stopped};
use crate::trained::Trained;

/// Copies the adapter with its tokenizer and template; its configuration names the base that was opened.
///
/// `stop` holds the number of a signal that asked to stop, or 0.
///
/// # Errors
/// An output folder that is taken; a write that fails, a signal (nothing is left then).
pub fn export_peft(trained: &Trained, out: &Path, stop: &AtomicUsize) -> Result<()> {
    let adapter = super::expect_possible(trained, out)?;
    let base = std::path::absolute(&trained.base_dir).map_err(Error::io("resolve", &trained.base_dir))?;
    write_whole(&LocalDisk, out, |folder| {
        let of_the_run = [MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE, CONFIG_FILE];
        for entry in std::fs::read_dir(&adapter.dir).map_err(Error::io("read", &adapter.dir))? {
            not_stopped(stop, super::STOPPED)?;
            let entry = entry.map_err(Error::io("read", &adapter.dir))?;
            let path = entry.path();
            if path.is_file() && of_the_run.iter().all(|name| entry.file_name() != *name) {
                folder.copy(&path)?;
            }
        }
        let config = AdapterConfig { base: Some(base.display().to_string()), ..adapter.config.clone() };
        folder.put(CONFIG_FILE, config.to_json().as_bytes())
    })?;
    Ok(())
}
