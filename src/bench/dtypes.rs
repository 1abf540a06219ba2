//! Which dtype a device multiplies fastest in.

use std::time::Duration;

use serde::Serialize;
use tch::Kind;

use super::ceiling;
use crate::config::{self, Auto, Config};
use crate::device::{self, BF16_CAPABILITY};
use crate::error::Result;
use crate::run::resolve_auto;
use crate::torch::cuda::set_numerics;
use crate::torch::memory;

/// For how long the products of a dtype are timed.
const TIME: Duration = Duration::from_millis(50);

/// The speed of large products in a dtype.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DtypeSpeed {
    /// As `model.dtype` names it.
    pub dtype: &'static str,
    /// 10^12 operations a second.
    pub tflops: f64,
}

/// Times products in fp32 and in the half-precision dtype that a run would take on the config's device, the fastest first.
/// fp16 is left out where there is bf16, which needs no loss scale.
///
/// # Errors
/// A device that is asked for and is not there; whatever libtorch says.
pub fn by_speed(mut config: Config) -> Result<Vec<DtypeSpeed>> {
    config.model.dtype = Auto::Is(config::Dtype::Fp32);
    resolve_auto::device_and_dtype(&mut config)?;
    set_numerics(false)?;
    let device = resolve_auto::device(&config);
    let half = match device.is_cuda() && device::capability() < BF16_CAPABILITY {
        true => ("fp16", Kind::Half),
        false => ("bf16", Kind::BFloat16),
    };
    let mut speeds = Vec::new();
    for (dtype, kind) in [("fp32", Kind::Float), half] {
        speeds.push(DtypeSpeed { dtype, tflops: ceiling::measure(kind, device, TIME)?.tflops });
        memory::release_cached(device)?;
    }
    speeds.sort_by(|a, b| b.tflops.total_cmp(&a.tflops));
    Ok(speeds)
}
