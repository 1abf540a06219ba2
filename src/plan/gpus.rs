//! The GPUs that a run can be planned for.

use crate::error::{Error, Result};

/// What a data sheet says of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuModel {
    /// The name on the command line.
    pub name: &'static str,
    /// Memory that the driver reports, in MiB: somewhat less than the name says.
    pub memory_mib: i64,
    /// Half-precision products with fp32 sums, dense, in TFLOP/s.
    pub peak_tflops: f64,
    /// Whether it computes in bf16 (from capability 8.0 on).
    pub has_bf16: bool,
}

/// What the driver, the CUDA context and the libraries' code take before a program has asked for anything.
const CONTEXT_MIB: i64 = 640;

/// From the least memory to the most.
pub const GPUS: [GpuModel; 12] = [
    GpuModel { name: "T4", memory_mib: 15_000, peak_tflops: 65.0, has_bf16: false },
    GpuModel { name: "V100-16", memory_mib: 16_150, peak_tflops: 125.0, has_bf16: false },
    GpuModel { name: "A10", memory_mib: 22_700, peak_tflops: 125.0, has_bf16: true },
    GpuModel { name: "L4", memory_mib: 22_700, peak_tflops: 121.0, has_bf16: true },
    GpuModel { name: "3090", memory_mib: 24_100, peak_tflops: 71.0, has_bf16: true },
    GpuModel { name: "4090", memory_mib: 24_100, peak_tflops: 165.0, has_bf16: true },
    GpuModel { name: "V100-32", memory_mib: 32_500, peak_tflops: 125.0, has_bf16: false },
    GpuModel { name: "A100-40", memory_mib: 40_300, peak_tflops: 312.0, has_bf16: true },
    GpuModel { name: "L40S", memory_mib: 45_500, peak_tflops: 362.0, has_bf16: true },
    GpuModel { name: "A100-80", memory_mib: 81_000, peak_tflops: 312.0, has_bf16: true },
    GpuModel { name: "H100", memory_mib: 81_000, peak_tflops: 989.0, has_bf16: true },
    GpuModel { name: "H200", memory_mib: 143_000, peak_tflops: 989.0, has_bf16: true },
];

impl GpuModel {
    /// Finds a GPU by its name, in letters of either case.
    ///
    /// # Errors
    /// A name that is not in the list.
    pub fn named(name: &str) -> Result<Self> {
        GPUS.into_iter().find(|gpu| gpu.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let known: Vec<&str> = GPUS.iter().map(|gpu| gpu.name).collect();
            Error::invalid("--gpu", format!("{name:?} is not known")).hint(format!("name one of {}", known.join(", ")))
        })
    }

    /// The bytes that a program finds free.
    pub fn available_bytes(&self) -> i64 {
        (self.memory_mib - CONTEXT_MIB) << 20
    }
}
