//! RMSNorm of each head of queries and keys, before they are rotated: one weight `[E]` for all heads of the queries, another for
//! those of the keys.

use tch::Tensor;

use crate::error::Result;
use crate::ops::attention::Heads;
use crate::ops::rms_norm::{self, RmsNormSaved};
use crate::ops::target::Target;

/// The two norms of a block.
#[derive(Debug)]
pub struct HeadNorms {
    /// `q_norm`.
    pub q_e: Tensor,
    /// `k_norm`.
    pub k_e: Tensor,
    /// Added to the mean squares.
    pub eps: f64,
}

/// What backward needs: the heads as they were before, queries `[N H, E]` and keys `[N K, E]`, and their statistics.
#[derive(Debug)]
pub struct HeadNormsSaved([(Tensor, RmsNormSaved); 2]);

impl HeadNorms {
    /// Norms the heads of queries and keys of `qkv [N, (H + 2K) E]` in place.
    pub fn forward_(&self, target: Target, qkv: &Tensor, heads: Heads) -> Result<HeadNormsSaved> {
        let norm = |(columns, weight): (Tensor, &Tensor)| -> Result<(Tensor, RmsNormSaved)> {
            let x = as_heads(&columns, heads.head_dim)?;
            let (y, saved) = rms_norm::forward(target, &x, weight, self.eps)?;
            put(&columns, &y)?;
            Ok((x, saved))
        };
        let [q, k] = self.parts(qkv, heads)?;
        Ok(HeadNormsSaved([norm(q)?, norm(k)?]))
    }

    /// Turns the gradient of the normed heads in `dqkv` into that of the heads before, in place.
    pub fn backward_(&self, target: Target, dqkv: &Tensor, heads: Heads, saved: &HeadNormsSaved) -> Result<()> {
        for ((columns, weight), (x, statistics)) in self.parts(dqkv, heads)?.into_iter().zip(&saved.0) {
            let dy = as_heads(&columns, heads.head_dim)?;
            let no_residual = dy.f_zeros_like()?;
            let (dx, _) = rms_norm::backward(target, &dy, x, weight, statistics, &no_residual)?;
            put(&columns, &dx)?;
        }
        Ok(())
    }

    /// The columns of the queries and of the keys, each with its weight.
    fn parts(&self, qkv: &Tensor, heads: Heads) -> Result<[(Tensor, &Tensor); 2]> {
        let (q, kv) = (heads.q_width(), heads.kv_width());
        Ok([(qkv.f_narrow(1, 0, q)?, &self.q_e), (qkv.f_narrow(1, q, kv)?, &self.k_e)])
    }
}

/// A copy of columns `[N, heads E]` with a row for every head, `[N heads, E]`.
fn as_heads(columns: &Tensor, head_dim: i64) -> Result<Tensor> {
    let (n, width) = columns.size2()?;
    let rows = Tensor::f_empty([n * (width / head_dim), head_dim], (columns.kind(), columns.device()))?;
    rows.f_view([n, width])?.f_copy_(columns)?;
    Ok(rows)
}

/// Puts rows of heads back into their columns.
fn put(columns: &Tensor, rows: &Tensor) -> Result<()> {
    columns.shallow_clone().f_copy_(&rows.f_view_as(columns)?)?;
    Ok(())
}
