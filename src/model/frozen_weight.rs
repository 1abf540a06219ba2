//! A frozen weight: the products that a step needs of it, however it is stored.

use tch::Tensor;

use crate::error::Result;
use crate::model::shape::ModelShape;
use crate::model::weights::BaseWeights;
use crate::ops::gemm;
use crate::ops::target::Target;

/// A frozen matrix `W [O, I]` in the compute dtype.
#[derive(Debug)]
pub struct FrozenWeight {
    weight_oi: Tensor,
    target: Target,
}

impl FrozenWeight {
    /// Loads tensors of the base that share their input, each with its rows, one below the other.
    ///
    /// # Errors
    /// As [`BaseWeights::fill`].
    pub fn load(
        base: BaseWeights<'_>,
        parts: &[(String, i64)],
        n_inputs: i64,
        config: &ModelShape,
        target: Target,
    ) -> Result<Self> {
        let rows: i64 = parts.iter().map(|(_, rows)| rows).sum();
        let weight_oi = Tensor::f_empty([rows, n_inputs], (target.kind, target.device))?;
        let mut start = 0;
        for (name, rows) in parts {
            base.fill(name, config, &weight_oi.f_narrow(0, start, *rows)?)?;
            start += rows;
        }
        Ok(Self { weight_oi, target })
    }

    /// Computes `x Wᵀ [N, O]`.
    pub fn product(&self, x_ni: &Tensor) -> Result<Tensor> {
        gemm::nt(self.target, x_ni, &self.weight_oi)
    }

    /// Computes `dy W [N, I]`, the gradient of the input.
    pub fn product_transposed(&self, dy_no: &Tensor) -> Result<Tensor> {
        gemm::nn(self.target, dy_no, &self.weight_oi)
    }
}
