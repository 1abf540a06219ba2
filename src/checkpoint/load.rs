//! Reading checkpoints.

use std::path::Path;

use tch::Tensor;

use crate::checkpoint::adapter_file;
use crate::checkpoint::save::OPTIMIZER_FILE;
use crate::checkpoint::state::Record;
use crate::error::{Error, Fault, Result};
use crate::formats::safetensors_in::TensorFiles;
use crate::model::params::ParamBuffer;

/// Reads a verified checkpoint back: parameters and moments in place; gives what it says of its run.
///
/// # Errors
/// A tensor that is missing, of another shape, or not part of this run.
pub fn load(dir: &Path, params: &mut ParamBuffer, moments: &[(String, Tensor)]) -> Result<Record> {
    let record = Record::read(dir)?;
    let adapter = TensorFiles::open(&[dir.join(adapter_file::WEIGHTS_FILE)])?;
    adapter_file::load_into(&adapter, params)?;
    let optimizer = TensorFiles::open(&[dir.join(OPTIMIZER_FILE)])?;
    let unknown: Vec<Fault> = optimizer
        .tensors()
        .keys()
        .filter(|name| moments.iter().all(|(known, _)| known != *name))
        .map(|name| Fault::new(optimizer.place(name), "is not part of this run's optimizer state"))
        .collect();
    if !unknown.is_empty() {
        return Err(Error::Invalid(unknown));
    }
    for (name, tensor) in moments {
        optimizer.copy_into(name, tensor)?;
    }
    Ok(record)
}
