//! RMSNorm with a frozen weight: `y = x · r · w`, `r = 1 / sqrt(mean(x²) + eps)` per row.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::ops::target::{Form, Target};
use crate::torch;
use crate::torch::number::WithNumber;

/// What backward needs besides `x` and `w`: the reciprocal root mean square of every row, fp32 (fp64 for fp64 input).
#[derive(Debug)]
pub struct RmsNormSaved {
    /// `[N, 1]`.
    pub rstd_n1: Tensor,
}

/// The dtype in which row statistics are kept.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Normalises the rows of `x_nd` and scales them by `w_d`; statistics in fp32, the result in the dtype of `x_nd`.
pub fn forward(target: Target, x_nd: &Tensor, w_d: &Tensor, eps: f64) -> Result<(Tensor, RmsNormSaved)> {
    if target.rows() == Form::CpuRows {
        let (y, rstd_n1) = torch::rms_norm(x_nd, None, w_d, eps)?;
        return Ok((y, RmsNormSaved { rstd_n1 }));
    }
    plain_forward(x_nd, w_d, eps)
}

/// Adds `residual_nd` to `x_nd` in place, then normalises the sum.
pub fn forward_add_(
    target: Target,
    x_nd: &mut Tensor,
    residual_nd: &Tensor,
    w_d: &Tensor,
    eps: f64,
) -> Result<(Tensor, RmsNormSaved)> {
    if target.rows() == Form::CpuRows {
        let (y, rstd_n1) = torch::rms_norm(x_nd, Some(residual_nd), w_d, eps)?;
        return Ok((y, RmsNormSaved { rstd_n1 }));
    }
    let _ = x_nd.f_add_(residual_nd)?;
    plain_forward(x_nd, w_d, eps)
}

/// Computes the gradient of `x` plus that of the residual path around the norm and, on the way, `y` again (which forward
/// did not keep).
///
/// `dx = r (g - x r² mean(g ⊙ x)) + dresidual` with `g = dy ⊙ w`.
pub fn backward(
    target: Target,
    dy_nd: &Tensor,
    x_nd: &Tensor,
    w_d: &Tensor,
    saved: &RmsNormSaved,
    dresidual_nd: &Tensor,
) -> Result<(Tensor, Tensor)> {
    if target.rows() == Form::CpuRows {
        return torch::rms_norm_backward(dy_nd, x_nd, w_d, &saved.rstd_n1, dresidual_nd);
    }
    plain_backward(dy_nd, x_nd, w_d, saved, dresidual_nd)
}

/// [`forward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_forward(x_nd: &Tensor, w_d: &Tensor, eps: f64) -> Result<(Tensor, RmsNormSaved)> {
    let kind = x_nd.kind();
    let x = x_nd.f_to_kind(wide(kind))?;
    let rstd_n1 = x.f_square()?.f_mean_dim(-1, true, wide(kind))?.f_plus(eps)?.f_rsqrt()?;
    let y = x.f_mul(&rstd_n1)?.f_mul(w_d)?.f_to_kind(kind)?;
    Ok((y, RmsNormSaved { rstd_n1 }))
}

/// [`backward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_backward(
    dy_nd: &Tensor,
    x_nd: &Tensor,
    w_d: &Tensor,
    saved: &RmsNormSaved,
    dresidual_nd: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let kind = x_nd.kind();
    let r = &saved.rstd_n1;
    let x = x_nd.f_to_kind(wide(kind))?;
    let g = dy_nd.f_to_kind(wide(kind))?.f_mul(w_d)?;
    let mean_n1 = g.f_mul(&x)?.f_mean_dim(-1, true, wide(kind))?;
    let dx = g.f_sub(&x.f_mul(&r.f_square()?.f_mul(&mean_n1)?)?)?.f_mul(r)?;
    Ok((dx.f_add(dresidual_nd)?.f_to_kind(kind)?, recompute(x_nd, w_d, saved)?))
}

/// Computes `y` again from the kept statistics.
pub fn recompute(x_nd: &Tensor, w_d: &Tensor, saved: &RmsNormSaved) -> Result<Tensor> {
    let kind = x_nd.kind();
    Ok(x_nd.f_to_kind(wide(kind))?.f_mul(&saved.rstd_n1)?.f_mul(w_d)?.f_to_kind(kind)?)
}
