//! Cross entropy over one chunk of logits: the loss, and the logits overwritten by their gradient.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::target::{Form, Target};
use crate::torch;
use crate::torch::number::filled;

/// The loss of an update, summed on the device and multiplied by the loss scale throughout. Both are 0-d, fp64.
#[derive(Debug)]
pub struct ScaledLoss {
    /// The factor on the loss, and so on every gradient: a power of two.
    pub scale: Tensor,
    /// The scaled losses so far.
    pub sum: Tensor,
}

impl ScaledLoss {
    /// No loss yet.
    pub fn new(scale: f64, device: Device) -> Result<Self> {
        let scalar = |value: f64| filled(&[], value, (Kind::Double, device));
        Ok(Self { scale: scalar(scale)?, sum: scalar(0.0)? })
    }

    /// The loss without its scale, 0-d on the device.
    pub fn value(&self) -> Result<Tensor> {
        Ok(self.sum.f_div(&self.scale)?)
    }

    fn add(&self, loss: &Tensor) -> Result<()> {
        let _ = self.sum.shallow_clone().f_add_(loss)?;
        Ok(())
    }
}

/// Adds the losses of the rows, `weight · scale · nll`, to the sum and turns the logits into the gradient of that sum.
///
/// `logits_np` has its logits in the first `vocab_size` columns; what lies beyond (the head's padding) comes out as zero.
/// `targets_n` i64; `weights_n` fp32, each row's share in the loss. The logits are consumed: on the CPU they are
/// overwritten.
pub fn forward_backward(
    target: Target,
    logits_np: Tensor,
    vocab_size: i64,
    targets_n: &Tensor,
    weights_n: &Tensor,
    loss: &ScaledLoss,
) -> Result<Tensor> {
    if target.rows() == Form::CpuRows {
        // A power of two changes no digit of a weight.
        let scaled_n = weights_n.f_mul(&loss.scale)?;
        let sum = torch::cross_entropy_(&logits_np, vocab_size, targets_n, &scaled_n)?;
        loss.add(&filled(&[], sum, (Kind::Double, Device::Cpu))?)?;
        return Ok(logits_np);
    }
    plain_forward_backward(&logits_np, vocab_size, targets_n, weights_n, loss)
}

/// [`forward_backward`] by libtorch's ops: every dtype and device, and the judge of the row kernel.
pub fn plain_forward_backward(
    logits_np: &Tensor,
    vocab_size: i64,
    targets_n: &Tensor,
    weights_n: &Tensor,
    loss: &ScaledLoss,
) -> Result<Tensor> {
    let scaled_n = weights_n.f_mul(&loss.scale)?;
    let (mut dlogits, nll_n) = negative_log_likelihood(&logits_np.f_narrow(1, 0, vocab_size)?, targets_n)?;
    loss.add(&nll_n.f_mul(&scaled_n)?.f_sum(Kind::Double)?)?;
    let targets_n1 = targets_n.f_unsqueeze(1)?;
    let minus_one = filled(&targets_n1.size(), -1.0, (dlogits.kind(), dlogits.device()))?;
    let _ = dlogits.f_scatter_add_(1, &targets_n1, &minus_one)?;
    let _ = dlogits.f_mul_(&scaled_n.f_unsqueeze(1)?)?;
    if logits_np.size()[1] == vocab_size {
        return Ok(dlogits.f_to_kind(logits_np.kind())?);
    }
    let padded = logits_np.f_zeros_like()?;
    padded.f_narrow(1, 0, vocab_size)?.f_copy_(&dlogits)?;
    Ok(padded)
}

/// The softmax `[N, V]` and the negative log-likelihood `[N]` of the targets, in fp32.
fn negative_log_likelihood(logits_nv: &Tensor, targets_n: &Tensor) -> Result<(Tensor, Tensor)> {
    let wide = if logits_nv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let mut log_softmax = logits_nv.f_log_softmax(-1, wide)?;
    let nll_n = log_softmax.f_gather(1, &targets_n.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?;
    Ok((log_softmax.f_exp_()?, nll_n))
}

/// The negative log-likelihood of each row's target, `[N]` in fp32, for evaluation.
pub fn nll(logits_nv: &Tensor, targets_n: &Tensor) -> Result<Tensor> {
    Ok(negative_log_likelihood(logits_nv, targets_n)?.1)
}
