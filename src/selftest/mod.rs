//! The check of a machine: every op of a training step, a tiny training run, and what ranks say to each other, against the
//! same in higher precision.
//!
//! [`run`] gives rows; whoever calls it shows them. Nothing is read from files, nothing is timed.

mod collectives;
mod judge;
mod ops;
mod training;

use serde::Serialize;
use tch::{Device, Kind};

pub use judge::{Row, largest_error, tolerance, unit_roundoff};
pub use training::TrainingCurve;

use crate::device::{BF16_CAPABILITY, Gpu};
use crate::error::Result;
use crate::torch::cuda::set_numerics;
use crate::torch::dtype;
use crate::torch::memory;

/// What the self-test computes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TestedMachine {
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// The dtypes it computes in.
    pub dtypes: Vec<&'static str>,
    /// Memory that is free at the start, in bytes.
    pub free_bytes: u64,
    /// The GPU, if it is one.
    pub gpu: Option<GpuFound>,
}

/// What was found of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuFound {
    /// Its name.
    pub name: String,
    /// Its compute capability: `9.0`.
    pub capability: String,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
    /// Its multiprocessors.
    pub n_multiprocessors: u32,
    /// The newest CUDA that its driver serves: `13.0`.
    pub driver: String,
    /// The CUDA that libtorch is built for.
    pub runtime: String,
    /// All of that in words.
    pub text: String,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SelftestReport {
    /// What it was found on.
    pub machine: TestedMachine,
    /// One row a result and dtype.
    pub rows: Vec<Row>,
    /// The losses of the tiny run in each dtype, and of its judge.
    pub training: Vec<TrainingCurve>,
    /// Whether all rows are in order.
    pub ok: bool,
}

impl SelftestReport {
    /// Puts the parts together.
    pub fn new(machine: TestedMachine, rows: Vec<Row>, training: Vec<TrainingCurve>) -> Self {
        let ok = rows.iter().all(|row| row.ok);
        Self { machine, rows, training, ok }
    }

    /// The rows that are not in order.
    pub fn failed(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.ok)
    }
}

/// Where the self-test computes.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// The processor.
    Cpu,
    /// The GPU that was found.
    Cuda(&'a Gpu),
}

impl Target<'_> {
    fn device(self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda(_) => Device::Cuda(0),
        }
    }

    /// The dtypes that training can compute in there.
    fn kinds(self) -> Vec<Kind> {
        match self {
            Self::Cuda(gpu) if gpu.capability < BF16_CAPABILITY => vec![Kind::Float, Kind::Half],
            _ => vec![Kind::Float, Kind::BFloat16, Kind::Half],
        }
    }

    fn machine(self) -> Result<TestedMachine> {
        let version = |number: u32| format!("{}.{}", number / 1000, number % 1000 / 10);
        Ok(TestedMachine {
            device: if self.device() == Device::Cpu { "cpu" } else { "cuda" },
            dtypes: self.kinds().into_iter().map(dtype::name).collect(),
            free_bytes: memory::free_bytes(self.device())?,
            gpu: match self {
                Self::Cpu => None,
                Self::Cuda(gpu) => Some(GpuFound {
                    name: gpu.name.clone(),
                    capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
                    total_bytes: gpu.total_bytes,
                    n_multiprocessors: gpu.n_multiprocessors,
                    driver: version(gpu.driver),
                    runtime: version(gpu.runtime),
                    text: gpu.to_string(),
                }),
            },
        })
    }
}

/// How much of the self-test is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Ops, the tiny training run, the collectives.
    Whole,
    /// The ops alone: no training and no ranks, so that a tool that slows every kernel down gets to the end.
    Kernels,
}

/// Tries what the scope holds on a device; `tell` hears each row as soon as it is known.
///
/// # Errors
/// Only where the judge itself, or the look at the machine, fails: an op that cannot run is a row that is not in order.
pub fn run(target: Target<'_>, scope: Scope, tell: &dyn Fn(&Row)) -> Result<SelftestReport> {
    set_numerics(false)?;
    let (device, kinds) = (target.device(), target.kinds());
    let machine = target.machine()?;
    let mut rows: Vec<Row> = kinds.iter().flat_map(|&kind| ops::try_all(kind, device, tell)).collect();
    if scope == Scope::Kernels {
        return Ok(SelftestReport::new(machine, rows, Vec::new()));
    }
    let (training, training_rows) = training::try_all(&kinds, device)?;
    training_rows.iter().for_each(tell);
    rows.extend(training_rows);
    let of_ranks = collectives::try_all(device);
    of_ranks.iter().for_each(tell);
    rows.extend(of_ranks);
    Ok(SelftestReport::new(machine, rows, training))
}
