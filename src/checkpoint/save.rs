//! Writing adapters and checkpoints.

use std::path::Path;

use safetensors::Dtype;
use tch::Tensor;

use crate::checkpoint::manifest::{replace_whole, step_dir};
use crate::checkpoint::state::RunState;
use crate::error::{Error, Result};
use crate::model::adapter_file::{self, AdapterConfig};

/// The optimizer's moments in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// An adapter with everything that makes it usable elsewhere.
#[derive(Debug)]
pub struct Adapter<'a> {
    /// `adapter_config.json`.
    pub config: &'a AdapterConfig,
    /// The trained tensors by PEFT's keys, fp32.
    pub tensors: &'a [(String, Tensor)],
    /// Small files that travel with it: the tokenizer's, `template.json`.
    pub beside: &'a [(String, Vec<u8>)],
}

impl Adapter<'_> {
    /// Writes the adapter's files into a folder; trained tables in `table_dtype`.
    pub fn write(&self, dir: &Path, table_dtype: Dtype) -> Result<()> {
        self.config.save(dir)?;
        for (name, contents) in self.beside {
            let path = dir.join(name);
            std::fs::write(&path, contents).map_err(Error::io("write", &path))?;
        }
        adapter_file::save_tensors(&dir.join(adapter_file::WEIGHTS_FILE), self.tensors, table_dtype)
    }
}

/// Writes the checkpoint of a step: whole under its final name, or not at all.
///
/// `moments` are the optimizer's tensors with their names, fp32.
pub fn save(checkpoints_dir: &Path, adapter: &Adapter, moments: &[(String, Tensor)], state: &RunState) -> Result<()> {
    replace_whole(&step_dir(checkpoints_dir, state.step), |dir| {
        adapter.write(dir, Dtype::F32)?;
        adapter_file::save_tensors(&dir.join(OPTIMIZER_FILE), moments, Dtype::F32)?;
        state.write(dir)
    })?;
    Ok(())
}
