//! Writing adapters and checkpoints.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use tch::Tensor;

use crate::checkpoint::adapter_file::{self, AdapterConfig};
use crate::checkpoint::folder::{NewFolder, replace_whole};
use crate::checkpoint::manifest::{Manifest, step_dir};
use crate::checkpoint::state::{Record, STATE_FILE};
use crate::disk::{Disk, free_bytes};
use crate::error::{Error, Result};
use crate::torch;

/// The optimizer's moments in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Bytes of a checkpoint for each parameter: the parameter itself and two moments, all fp32.
pub const BYTES_PER_PARAM: u64 = 12;

/// Room that must be left for what is small: the tokenizer's files, headers, logs.
const SMALL_FILES_BYTES: u64 = 16 << 20;

/// An adapter with everything that makes it usable elsewhere.
#[derive(Debug)]
pub struct Adapter {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// The trained tensors by PEFT's keys: contiguous, fp32, on the CPU.
    pub tensors: Vec<(String, Tensor)>,
    /// Small files that travel with it: the tokenizer's, `template.json`.
    pub beside: Vec<(String, Vec<u8>)>,
}

impl Adapter {
    /// Writes the adapter's files into a folder; trained tables in `table_dtype`.
    ///
    /// # Errors
    /// A tensor that holds NaN or infinity; [`Error::Io`].
    pub fn write(&self, folder: &mut NewFolder<'_>, table_dtype: Dtype) -> Result<()> {
        all_finite(&self.tensors)?;
        folder.put(adapter_file::CONFIG_FILE, self.config.to_json().as_bytes())?;
        for (name, contents) in &self.beside {
            folder.put(name, contents)?;
        }
        write_tensors(folder, adapter_file::WEIGHTS_FILE, &self.tensors, table_dtype)
    }
}

/// A run at a step, apart from the run itself, which goes on.
#[derive(Debug)]
pub struct Snapshot {
    /// The trained parameters.
    pub adapter: Adapter,
    /// The optimizer's tensors by their names: contiguous, fp32, on the CPU.
    pub moments: Vec<(String, Tensor)>,
    /// The rest.
    pub record: Record,
}

impl Snapshot {
    /// Writes the checkpoint: whole under its final name, or not at all. One of the same step is replaced.
    ///
    /// # Errors
    /// A disk without room for it, before anything is written; a tensor that holds NaN or infinity; [`Error::Io`].
    pub fn save(&self, disk: &dyn Disk, checkpoints_dir: &Path) -> Result<(PathBuf, Manifest)> {
        let dir = step_dir(checkpoints_dir, self.record.state.step);
        self.fits(disk, &dir)?;
        all_finite(&self.moments)?;
        let manifest = replace_whole(disk, &dir, |folder| {
            self.adapter.write(folder, Dtype::F32)?;
            write_tensors(folder, OPTIMIZER_FILE, &self.moments, Dtype::F32)?;
            folder.put(STATE_FILE, self.record.to_text().as_bytes())
        })?;
        Ok((dir, manifest))
    }

    /// Bytes of its tensors.
    pub fn n_bytes(&self) -> u64 {
        let tensors = self.adapter.tensors.iter().chain(&self.moments);
        tensors.map(|(_, tensor)| 4 * tensor.numel() as u64).sum()
    }

    fn fits(&self, disk: &dyn Disk, dir: &Path) -> Result<()> {
        let needed = self.n_bytes();
        match free_bytes(disk, dir) {
            Some(free) if free < needed => Err(Error::Io {
                doing: "write",
                path: dir.to_path_buf(),
                source: std::io::Error::new(
                    std::io::ErrorKind::StorageFull,
                    format!("it needs {}, and {} are free", mib(needed), mib(free)),
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// The most that a run will write below its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunBytes {
    /// One checkpoint.
    pub checkpoint: u64,
    /// The most checkpoints that are there at a time: those that are kept and the one being written.
    pub checkpoints: u64,
    /// The final adapter.
    pub adapter: u64,
}

impl RunBytes {
    /// A run with so many trained parameters, `table_params` of them in tables that the adapter has in `table_bytes` each,
    /// and so many checkpoints at a time.
    pub fn new(n_params: u64, table_params: u64, table_bytes: u64, checkpoints: u64) -> Self {
        Self {
            checkpoint: BYTES_PER_PARAM * n_params,
            checkpoints,
            adapter: 4 * (n_params - table_params) + table_bytes * table_params,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.checkpoint * self.checkpoints + self.adapter
    }

    /// Refuses a disk on which the run cannot fit; `there` bytes of it are written already.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the numbers.
    pub fn fit(&self, disk: &dyn Disk, run_dir: &Path, there: u64) -> Result<()> {
        let needed = self.total().saturating_sub(there) + SMALL_FILES_BYTES;
        let Some(free) = free_bytes(disk, run_dir).filter(|free| *free < needed) else { return Ok(()) };
        let what = format!(
            "{} has {} free, and the run needs {}: {} checkpoints of {} and the adapter of {}",
            run_dir.display(),
            mib(free),
            mib(needed),
            self.checkpoints,
            mib(self.checkpoint),
            mib(self.adapter),
        );
        Err(Error::invalid("train.output", what)
            .hint("make room there, name another place, or lower train.keep_checkpoints"))
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn write_tensors(folder: &mut NewFolder<'_>, name: &str, named: &[(String, Tensor)], table_dtype: Dtype) -> Result<()> {
    folder.write(name, |file| {
        let path = file.path().to_path_buf();
        adapter_file::write_tensors(file, &path, named, table_dtype)
    })
}

/// A state that holds NaN or infinity is never written: a run that went on from it would be lost.
fn all_finite(named: &[(String, Tensor)]) -> Result<()> {
    match named.iter().find(|(_, tensor)| torch::bytes(tensor).as_chunks().0.iter().any(is_not_finite)) {
        None => Ok(()),
        Some((name, _)) => Err(Error::failed(name, "holds NaN or infinity and is not saved")
            .hint("lower train.learning_rate; the newest checkpoint is from before it")),
    }
}

/// Whether the exponent of an fp32 number has all its bits set.
fn is_not_finite(bytes: &[u8; 4]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    u32::from_ne_bytes(*bytes) & EXPONENT == EXPONENT
}
