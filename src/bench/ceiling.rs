//! The machine's own ceiling: the fastest large product it makes.

use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::gemm;
use crate::ops::target::Target;
use crate::torch::memory::synchronize;

/// Rows and columns of the operands: large enough that products of a training run are no faster.
const SIZE_ON_GPU: i64 = 8192;
const SIZE_ON_CPU: i64 = 1024;
/// Products before those that count.
const WARMUP: u32 = 3;
/// Products that count, at least.
const REPEATS: u32 = 5;

/// The fastest product that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ceiling {
    /// Rows and columns of both operands and of the product.
    pub size: i64,
    /// 10^12 operations a second.
    pub tflops: f64,
    /// Products that were timed; the best counts.
    pub repeats: u32,
}

/// Times square products of a dtype on a device for so long.
///
/// The operands are drawn: a GPU is faster on zeros than it can ever be on real numbers.
pub(super) fn measure(kind: Kind, device: Device, time: Duration) -> Result<Ceiling> {
    let size = if device.is_cuda() { SIZE_ON_GPU } else { SIZE_ON_CPU };
    let operand = || -> Result<Tensor> { Ok(Tensor::f_empty([size, size], (kind, device))?.f_normal_(0.0, 1.0)?) };
    let (a, b) = (operand()?, operand()?);
    let target = Target::new(device, kind);
    for _ in 0..WARMUP {
        let _ = gemm::nt(target, &a, &b)?;
    }
    synchronize(device)?;
    let (begun, mut best, mut repeats) = (Instant::now(), f64::INFINITY, 0);
    while repeats < REPEATS || begun.elapsed() < time {
        let started = Instant::now();
        let _ = gemm::nt(target, &a, &b)?;
        synchronize(device)?;
        best = best.min(started.elapsed().as_secs_f64());
        repeats += 1;
    }
    Ok(Ceiling { size, tflops: 2.0 * (size as f64).powi(3) / best / 1e12, repeats })
}
