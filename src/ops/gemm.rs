//! Matrix products: every product of the engine goes through these few functions.
//!
//! `nt` multiplies by a transpose on the right (`a bᵀ`), `nn` by none, `tn` by a transpose on the left (`aᵀ b`).
//! Half-precision products accumulate in fp32 inside libtorch and are rounded once.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::ops::target::Target;
use crate::torch::{self, addmm_, cuda};

/// Computes `x wᵀ`: `[N, I] x [O, I] -> [N, O]`.
pub fn nt(target: Target, x_ni: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    if is_fp32_on_cpu(target) { torch::onednn_linear(x_ni, w_oi) } else { Ok(x_ni.f_mm(&w_oi.f_tr()?)?) }
}

/// Computes `dy w`: `[N, O] x [O, I] -> [N, I]`.
pub fn nn(target: Target, dy_no: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    if is_fp32_on_cpu(target) { torch::onednn_linear(dy_no, &w_oi.f_tr()?) } else { Ok(dy_no.f_mm(w_oi)?) }
}

/// Overwrites `out` `[N, I]`, which may be a slice of columns, by `dy w`: `[N, O] x [O, I]`.
///
/// Where `out` is a slice nothing is copied on a GPU, nor in fp64. On the CPU the other dtypes make the product apart and copy it:
/// oneDNN's fp32 product has no output to be given, and libtorch leaves its half-precision one for an output that is not contiguous.
pub fn nn_into_(target: Target, out_ni: &Tensor, dy_no: &Tensor, w_oi: &Tensor) -> Result<()> {
    if target.is_cpu() && target.kind != Kind::Double {
        out_ni.shallow_clone().f_copy_(&nn(target, dy_no, w_oi)?)?;
        return Ok(());
    }
    // With beta = 0 what lay there before is not read, be it NaN.
    addmm_(out_ni, dy_no, w_oi, 0.0, 1.0)
}

fn is_fp32_on_cpu(target: Target) -> bool {
    target.is_cpu() && target.kind == Kind::Float
}

/// Adds `x wᵀ` to `out` `[N, O]`, which may be a slice of columns.
pub fn add_nt_(target: Target, out_no: &Tensor, x_ni: &Tensor, w_oi: &Tensor) -> Result<()> {
    add_product_(target, out_no, x_ni, &w_oi.f_tr()?)
}

/// Adds `dy w` to `out` `[N, I]`.
pub fn add_nn_(target: Target, out_ni: &Tensor, dy_no: &Tensor, w_oi: &Tensor) -> Result<()> {
    add_product_(target, out_ni, dy_no, w_oi)
}

/// Adds `a b` to `out`. In half precision on the CPU the product is made apart: with an output that is not contiguous
/// libtorch leaves oneDNN for a product that is many times slower.
fn add_product_(target: Target, out: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    if target.is_cpu() && matches!(target.kind, Kind::BFloat16 | Kind::Half) {
        let _ = out.shallow_clone().f_add_(&a.f_mm(b)?)?;
        return Ok(());
    }
    addmm_(out, a, b, 1.0, 1.0)
}

/// Adds `dyᵀ x` to a gradient in the flat buffer: `[N, O] x [N, I] -> [O, I]` in its own (wider) dtype.
///
/// On a GPU nothing is rounded on the way. libtorch's CPU library has no product with an fp32 result from half-precision
/// operands, so there the product of one micro-batch is rounded to the operands' dtype and accumulated in fp32.
pub fn accumulate_tn_(target: Target, grad_oi: &Tensor, dy_no: &Tensor, x_ni: &Tensor) -> Result<()> {
    let dy_on = dy_no.f_tr()?;
    if grad_oi.kind() == target.kind {
        return addmm_(grad_oi, &dy_on, x_ni, 1.0, 1.0);
    }
    if !target.is_cpu() {
        return cuda::addmm_fp32_(grad_oi, &dy_on, x_ni);
    }
    let _ = grad_oi.shallow_clone().f_add_(&dy_on.f_mm(x_ni)?)?;
    Ok(())
}
