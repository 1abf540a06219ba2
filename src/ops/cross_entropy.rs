//! Cross entropy over one chunk of logits: the loss, and the logits overwritten by their gradient.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Sums `weight · nll` over the rows and returns the gradient of that sum, scaled, in the dtype of the logits.
///
/// `logits_nv` any dtype; `targets_n` i64; `weights_n` fp32 (each row's share in the loss). The sum is an fp32 scalar
/// (fp64 for fp64 logits) without `loss_scale`; the gradient is `weight · loss_scale · (softmax - onehot)`.
pub fn forward_backward(
    logits_nv: &Tensor,
    targets_n: &Tensor,
    weights_n: &Tensor,
    loss_scale: f64,
) -> Result<(Tensor, Tensor)> {
    let nll_n = negative_log_likelihood(logits_nv, targets_n)?;
    let loss = nll_n.1.f_mul(weights_n)?.f_sum(nll_n.1.kind())?;
    let targets_n1 = targets_n.f_unsqueeze(1)?;
    let mut dlogits = nll_n.0;
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
