//! The global gradient norm and clipping by it.

use tch::Tensor;

use crate::error::Result;
use crate::torch;

/// The L2 norm of a flat fp32 buffer; the squares are summed in fp64, so it is infinite or NaN only if an element is.
pub fn norm(flat: &Tensor) -> Result<f64> {
    Ok(torch::sum_of_squares(flat)?.sqrt())
}

/// The factor that clips a gradient of norm `norm` to `max_norm` (0: no clipping), as PyTorch's: at most 1.
pub fn coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}
