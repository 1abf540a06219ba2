//! AdamW over the flat buffers, as PyTorch's: `p -= lr wd p`, then `p -= lr m̂ / (sqrt(v̂) + eps)`.

use tch::{Kind, Tensor};

use crate::engine::optim::control::Decision;
use crate::error::Result;
use crate::model::params::{Gradients, Layout, ParamBuffer, Shard, named_views};
use crate::torch::{self, AdamWStep};

/// The optimizer's numbers that stay the same through a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The optimizer: two moments for every parameter that this rank updates, flat and in fp32.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl AdamW {
    /// Starts with zero moments.
    pub fn new(config: AdamWConfig, params: &ParamBuffer) -> Result<Self> {
        let zeros = || Tensor::f_zeros([params.layout().buffer_len()], (Kind::Float, params.device()));
        Ok(Self { config, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }

    /// Leaves the moments of all but a shard to other ranks.
    pub fn keep(&mut self, shard: &Shard) -> Result<()> {
        (self.exp_avg, self.exp_avg_sq) = (shard.packed(&self.exp_avg)?, shard.packed(&self.exp_avg_sq)?);
        Ok(())
    }

    /// Both moments by name, flat: of all parameters, or of the shard that was kept.
    pub fn moments(&self) -> [(&'static str, &Tensor); 2] {
        [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }

    /// Both moments of every parameter by name, `exp_avg.KEY` and `exp_avg_sq.KEY`: views of the state itself, before
    /// [`Self::keep`].
    pub fn named_moments(&self, layout: &Layout) -> Result<Vec<(String, Tensor)>> {
        let mut named = Vec::new();
        for (moment, flat) in self.moments() {
            named.extend(of_moment(moment, named_views(layout, flat)?));
        }
        Ok(named)
    }

    /// Applies an update as it was decided to the parameters that this rank updates, and refreshes their compute copy. The
    /// gradients are used up.
    pub fn step(&mut self, params: &mut ParamBuffer, grads: &Gradients, decision: &Decision) -> Result<()> {
        let AdamWConfig { betas, eps, weight_decay } = self.config;
        let Decision { lr, update, grad_divisor, skip } = decision;
        let numbers = AdamWStep { lr, update, grad_divisor, skip, betas, eps, weight_decay };
        let shard = params.shard();
        let (masters, grads) = (params.shard_masters()?, shard.of_whole(grads.flat())?);
        let (exp_avg, exp_avg_sq) = (shard.of_packed(&self.exp_avg)?, shard.of_packed(&self.exp_avg_sq)?);
        for (((master, grad), exp_avg), exp_avg_sq) in masters.iter().zip(&grads).zip(&exp_avg).zip(&exp_avg_sq) {
            torch::fused_adamw_(master, grad, exp_avg, exp_avg_sq, numbers)?;
        }
        params.refresh_compute()
    }
}

/// Names tensors as those of a moment.
pub fn of_moment(moment: &str, named: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    named.into_iter().map(|(name, tensor)| (format!("{moment}.{name}"), tensor)).collect()
}
