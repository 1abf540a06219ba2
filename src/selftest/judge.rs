//! How a result is held against its judge: the largest difference, and what rounding alone may make of it.

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::target::Target;
use crate::torch::dtype;

/// One result of one op in one dtype, held against the same in higher precision.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The op and which of its results.
    pub op: String,
    /// The dtype it was computed in: `fp32`, `bf16` or `fp16`.
    pub dtype: &'static str,
    /// The largest difference as a share of the judge's largest element; infinite (in JSON `null`) for a result that has another
    /// shape, is not finite or is not there.
    pub error: f64,
    /// The largest error that rounding explains.
    pub tolerance: f64,
    /// Whether the error is within the tolerance.
    pub ok: bool,
    /// Why there is no result; empty where there is one.
    pub fault: String,
}

impl Row {
    /// Holds an error against its tolerance.
    pub fn new(op: &str, kind: Kind, error: f64, tolerance: f64) -> Self {
        Self { op: op.into(), dtype: dtype::name(kind), error, tolerance, ok: error <= tolerance, fault: String::new() }
    }

    /// A result that could not be had.
    pub fn without_result(op: &str, kind: Kind, fault: String) -> Self {
        Self { op: op.into(), dtype: dtype::name(kind), error: f64::INFINITY, tolerance: 0.0, ok: false, fault }
    }

    /// How much of its tolerance an error uses up.
    fn strain(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance }
    }
}

/// The largest difference of two tensors, as a share of the judge's largest element.
///
/// Infinite where the shapes differ, where a difference is not finite, and where a judge that is all zero is missed.
pub fn largest_error(ours: &Tensor, judge: &Tensor) -> Result<f64> {
    if ours.size() != judge.size() {
        return Ok(f64::INFINITY);
    }
    let wide = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?) };
    let judge = wide(judge)?;
    // libtorch's maximum of numbers among which is a NaN is NaN.
    let largest = |t: &Tensor| -> Result<f64> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    let difference = largest(&wide(ours)?.f_sub(&judge)?)?;
    if difference == 0.0 {
        return Ok(0.0);
    }
    let error = difference / largest(&judge)?;
    Ok(if error.is_finite() { error } else { f64::INFINITY })
}

/// The largest relative error of rounding once to a dtype: half a unit in the last of its 24, 8 or 11 binary places.
pub fn unit_roundoff(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 2f64.powi(-8),
        Kind::Half => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    }
}

/// The error that a result may have whose value was rounded to its dtype `n_roundings` times on the way, and in which sums
/// of `n_terms` terms were made in fp32, each addition of which rounds too.
///
/// In fp32 this is far below what products in TF32 would make, which libtorch can be told to use.
pub fn tolerance(kind: Kind, n_roundings: u32, n_terms: i64) -> f64 {
    f64::from(n_roundings) * unit_roundoff(kind) + n_terms as f64 * unit_roundoff(Kind::Float)
}

/// The same numbers twice: as the op under test gets them, and for its judge.
pub(super) struct Twin {
    /// In the dtype under test, on its device.
    pub(super) ours: Tensor,
    /// The same values in fp64 on the CPU.
    pub(super) judge: Tensor,
}

/// A dtype on a device, and the rows that were found for it.
pub(super) struct Bench {
    /// The dtype under test.
    pub(super) kind: Kind,
    /// Where its ops run.
    pub(super) device: Device,
    /// Both, as ops are told.
    pub(super) target: Target,
    rows: Vec<Row>,
}

impl Bench {
    /// Begins with draws that are the same for every device.
    pub(super) fn new(kind: Kind, device: Device) -> Self {
        tch::manual_seed(1);
        Self { kind, device, target: Target::new(device, kind), rows: Vec::new() }
    }

    /// Rounds numbers (fp64, on the CPU) to the dtype under test and gives both sides the rounded ones.
    pub(super) fn twin(&self, values: &Tensor) -> Result<Twin> {
        self.twin_in(values, self.kind)
    }

    /// [`Self::twin`] in another dtype: for what is fp32 in every run.
    pub(super) fn twin_in(&self, values: &Tensor, kind: Kind) -> Result<Twin> {
        let rounded = values.f_to_kind(kind)?;
        Ok(Twin { judge: rounded.f_to_kind(Kind::Double)?, ours: rounded.f_to_device(self.device)? })
    }

    /// Draws from N(0, 1).
    pub(super) fn normal(&self, shape: &[i64]) -> Result<Twin> {
        self.twin(&Tensor::f_randn(shape, FP64)?)
    }

    /// A tensor that is not rounded (ids, positions) on the device.
    pub(super) fn put(&self, t: &Tensor) -> Result<Tensor> {
        Ok(t.f_to_device(self.device)?)
    }

    /// Holds a result against its judge. Of several results under one name the one nearest to failing stays.
    pub(super) fn hold(&mut self, op: &str, ours: &Tensor, judge: &Tensor, tolerance: f64) -> Result<()> {
        self.push(Row::new(op, self.kind, largest_error(ours, judge)?, tolerance));
        Ok(())
    }

    /// Takes a row, as [`Self::hold`].
    pub(super) fn push(&mut self, row: Row) {
        match self.rows.iter_mut().find(|other| other.op == row.op) {
            Some(other) if other.ok && (!row.ok || row.strain() > other.strain()) => *other = row,
            Some(_) => {}
            None => self.rows.push(row),
        }
    }

    /// The rows that were found.
    pub(super) fn into_rows(self) -> Vec<Row> {
        self.rows
    }
}

/// Where the judges compute.
pub(super) const FP64: (Kind, Device) = (Kind::Double, Device::Cpu);
