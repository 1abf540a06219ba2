//! Cross entropy over one chunk of logits: the loss, and the logits overwritten by their gradient.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::torch::{self, has_row_kernels};

/// Sums `weight · nll` over the rows and turns the logits into the gradient of that sum, scaled, in their dtype.
///
/// `targets_n` i64; `weights_n` fp32 (each row's share in the loss). The sum does not hold `loss_scale`; the gradient is
/// `weight · loss_scale · (softmax - onehot)`. The logits are consumed: on the CPU they are overwritten.
pub fn forward_backward(
    logits_nv: Tensor,
    targets_n: &Tensor,
    weights_n: &Tensor,
    loss_scale: f64,
) -> Result<(f64, Tensor)> {
    if has_row_kernels(&logits_nv) {
        let loss = torch::cross_entropy_(&logits_nv, targets_n, weights_n, loss_scale)?;
        return Ok((loss, logits_nv));
    }
    plain_forward_backward(&logits_nv, targets_n, weights_n, loss_scale)
}

/// [`forward_backward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_forward_backward(
    logits_nv: &Tensor,
    targets_n: &Tensor,
    weights_n: &Tensor,
    loss_scale: f64,
) -> Result<(f64, Tensor)> {
    let (mut dlogits, nll_n) = negative_log_likelihood(logits_nv, targets_n)?;
    let loss = nll_n.f_mul(weights_n)?.f_sum(Kind::Double)?.f_double_value(&[])?;
    let targets_n1 = targets_n.f_unsqueeze(1)?;
    let minus_one = Tensor::f_full(targets_n1.size(), -1.0, (dlogits.kind(), dlogits.device()))?;
    let _ = dlogits.f_scatter_add_(1, &targets_n1, &minus_one)?;
    let _ = dlogits.f_mul_(&weights_n.f_unsqueeze(1)?.f_mul_scalar(loss_scale)?)?;
    Ok((loss, dlogits.f_to_kind(logits_nv.kind())?))
}

/// The softmax `[N, V]` and the negative log-likelihood `[N]` of the targets, in fp32.
fn negative_log_likelihood(logits_nv: &Tensor, targets_n: &Tensor) -> Result<(Tensor, Tensor)> {
    let wide = if logits_nv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let log_softmax = logits_nv.f_log_softmax(-1, wide)?;
    let nll_n = log_softmax.f_gather(1, &targets_n.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?;
    Ok((log_softmax.f_exp()?, nll_n))
}

/// The negative log-likelihood of each row's target, `[N]` in fp32, for evaluation.
pub fn nll(logits_nv: &Tensor, targets_n: &Tensor) -> Result<Tensor> {
    Ok(negative_log_likelihood(logits_nv, targets_n)?.1)
}
