//! Matrix products: every product of the engine goes through these few functions.
//!
//! `nt` multiplies by a transpose on the right (`a bᵀ`), `nn` by none, `tn` by a transpose on the left (`aᵀ b`).
//! Half-precision products accumulate in fp32 inside libtorch and are rounded once.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::torch::addmm_;

/// Computes `x wᵀ`: `[N, I] x [O, I] -> [N, O]`.
pub fn nt(x_ni: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    Ok(x_ni.f_mm(&w_oi.f_tr()?)?)
}

/// Computes `dy w`: `[N, O] x [O, I] -> [N, I]`.
pub fn nn(dy_no: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    Ok(dy_no.f_mm(w_oi)?)
}

/// Adds `alpha x wᵀ` to `out` `[N, O]`, which may be a slice of columns.
pub fn add_nt_(out_no: &Tensor, x_ni: &Tensor, w_oi: &Tensor, alpha: f64) -> Result<()> {
    addmm_(out_no, x_ni, &w_oi.f_tr()?, 1.0, alpha)
}

/// Adds `dy w` to `out` `[N, I]`.
pub fn add_nn_(out_ni: &Tensor, dy_no: &Tensor, w_oi: &Tensor) -> Result<()> {
    addmm_(out_ni, dy_no, w_oi, 1.0, 1.0)
}

/// Writes `alpha dy w` into `out` `[N, I]`, which may be a slice of columns.
pub fn write_nn_(out_ni: &Tensor, dy_no: &Tensor, w_oi: &Tensor, alpha: f64) -> Result<()> {
    addmm_(out_ni, dy_no, w_oi, 0.0, alpha)
}

/// Adds `alpha dyᵀ x` to a gradient in the flat buffer: `[N, O] x [N, I] -> [O, I]` in its own (wider) dtype.
///
/// libtorch's CPU library has no product with an fp32 result from half-precision operands, so there the product of
/// one micro-batch is rounded to the operands' dtype and accumulated in fp32.
pub fn accumulate_tn_(grad_oi: &Tensor, dy_no: &Tensor, x_ni: &Tensor, alpha: f64) -> Result<()> {
    let dy_on = dy_no.f_tr()?;
    if grad_oi.kind() == dy_no.kind() {
        return addmm_(grad_oi, &dy_on, x_ni, 1.0, alpha);
    }
    let product = dy_on.f_mm(x_ni)?.f_to_kind(Kind::Float)?;
    let _ = grad_oi.shallow_clone().f_add_(&product.f_mul_scalar(alpha)?)?;
    Ok(())
}
