//! SwiGLU: `h = silu(g) ⊙ u` over the gate and up projections that lie side by side in one tensor.

use tch::Tensor;

use crate::error::Result;
use crate::ops::target::{Form, Target};
use crate::torch;

/// Computes `h_nf` from `gu_n2f = [g | u]`; nothing but the input is kept.
pub fn forward(target: Target, gu_n2f: &Tensor) -> Result<Tensor> {
    match target.rows() {
        Form::CpuRows => torch::swiglu(gu_n2f),
        Form::Plain => plain_forward(gu_n2f),
    }
}

/// Computes `[dg | du]` and, on the way, `h` again (which forward did not keep).
///
/// `dg = dh u σ(g) (1 + g (1 - σ(g)))`, `du = dh silu(g)`.
pub fn backward(target: Target, dh_nf: &Tensor, gu_n2f: &Tensor) -> Result<(Tensor, Tensor)> {
    match target.rows() {
        Form::CpuRows => torch::swiglu_backward(dh_nf, gu_n2f),
        Form::Plain => plain_backward(dh_nf, gu_n2f),
    }
}

/// [`forward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_forward(gu_n2f: &Tensor) -> Result<Tensor> {
    let f = gu_n2f.size()[1] / 2;
    Ok(gu_n2f.f_narrow(1, 0, f)?.f_silu()?.f_mul(&gu_n2f.f_narrow(1, f, f)?)?)
}

/// [`backward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_backward(dh_nf: &Tensor, gu_n2f: &Tensor) -> Result<(Tensor, Tensor)> {
    let f = gu_n2f.size()[1] / 2;
    let (g, u) = (gu_n2f.f_narrow(1, 0, f)?, gu_n2f.f_narrow(1, f, f)?);
    let silu = g.f_silu()?;
    let dgu = gu_n2f.f_empty_like()?;
    dgu.f_narrow(1, 0, f)?.f_copy_(&g.f_silu_backward(&dh_nf.f_mul(&u)?)?)?;
    dgu.f_narrow(1, f, f)?.f_copy_(&dh_nf.f_mul(&silu)?)?;
    Ok((dgu, silu.f_mul(&u)?))
}
