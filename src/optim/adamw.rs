//! AdamW over the flat buffers, as PyTorch's: `p -= lr wd p`, then `p -= lr m̂ / (sqrt(v̂) + eps)`.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::model::params::{Gradients, Layout, ParamBuffer, named_copies, named_views};
use crate::optim::control::Decision;
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

/// The optimizer: two moments for every parameter, flat and in fp32.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl AdamW {
    /// Starts with zero moments.
    pub fn new(config: AdamWConfig, params: &ParamBuffer) -> Result<Self> {
        let zeros = || Tensor::f_zeros(params.master().size(), (Kind::Float, params.master().device()));
        Ok(Self { config, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }

    /// Both moments, flat.
    pub fn moments(&self) -> [&Tensor; 2] {
        [&self.exp_avg, &self.exp_avg_sq]
    }

    /// Both moments of every parameter by name, `exp_avg.KEY` and `exp_avg_sq.KEY`: views of the state itself.
    pub fn named_moments(&self, layout: &Layout) -> Result<Vec<(String, Tensor)>> {
        self.named(layout, named_views)
    }

    /// Copies of both moments on the CPU, by the same names.
    pub fn copied_moments(&self, layout: &Layout) -> Result<Vec<(String, Tensor)>> {
        self.named(layout, named_copies)
    }

    fn named(
        &self,
        layout: &Layout,
        tensors: impl Fn(&Layout, &Tensor) -> Result<Vec<(String, Tensor)>>,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut named = Vec::new();
        for (moment, flat) in [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)] {
            named.extend(tensors(layout, flat)?.into_iter().map(|(name, tensor)| (format!("{moment}.{name}"), tensor)));
        }
        Ok(named)
    }

    /// Applies an update as it was decided and refreshes the parameters' compute copy. The gradients are used up.
    pub fn step(&mut self, params: &mut ParamBuffer, grads: &Gradients, decision: &Decision) -> Result<()> {
        let AdamWConfig { betas, eps, weight_decay } = self.config;
        let Decision { lr, update, grad_divisor, skip } = decision;
        let numbers = AdamWStep { lr, update, grad_divisor, skip, betas, eps, weight_decay };
        torch::fused_adamw_(params.master(), grads.flat(), &self.exp_avg, &self.exp_avg_sq, numbers)?;
        params.refresh_compute()
    }
}
