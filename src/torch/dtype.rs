//! The dtypes of computing, by the names that configs have for them.

use tch::Kind;

/// `fp32`, `bf16`, `fp16` or `fp64`.
pub fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        Kind::Double => "fp64",
        _ => "fp32",
    }
}
