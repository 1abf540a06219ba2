//! A frozen linear map with low-rank adapters: `y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ`, x̃ = dropout(x).
//!
//! Projections that share their input (q, k, v; gate, up) are one map: their weights stand in one matrix and are one
//! product, and so do their `lora_A`.

use tch::Tensor;

use crate::error::Result;
use crate::model::frozen_weight::FrozenWeight;
use crate::model::params::{Gradients, ParamBuffer};
use crate::ops::gemm;
use crate::ops::target::Target;
use crate::torch::number::WithNumber;

/// Applies an input's dropout mask.
pub type Mask<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

/// One projection's adapter within the map.
#[derive(Debug)]
struct Adapter {
    /// First output column and number of columns of the projection.
    start: i64,
    width: i64,
    /// `B`, compute copy.
    b_or: Tensor,
    /// Index of `B` in the layout.
    b_index: usize,
}

/// The adapters of one map, their `A` stacked.
#[derive(Debug)]
struct Adapters {
    a_ri: Tensor,
    a_first: usize,
    each: Vec<Adapter>,
    r: i64,
    scale: f64,
}

/// A frozen linear map `[O, I]` and the adapters on parts of its output.
#[derive(Debug)]
pub struct AdaptedLinear {
    weight: FrozenWeight,
    bias_o: Option<Tensor>,
    adapters: Option<Adapters>,
    target: Target,
}

/// An adapter to be put on a map: which output columns, and where `A` and `B` lie in the layout.
#[derive(Debug, Clone, Copy)]
pub struct AdapterPlace {
    /// First output column of the projection.
    pub start: i64,
    /// Number of its output columns.
    pub width: i64,
    /// Index of `lora_A`.
    pub a_index: usize,
    /// Index of `lora_B`.
    pub b_index: usize,
}

impl AdaptedLinear {
    /// Puts adapters on a frozen map; the places are ascending and their `lora_A` adjoin in the layout.
    pub fn new(
        weight: FrozenWeight,
        bias_o: Option<Tensor>,
        places: &[AdapterPlace],
        scale: f64,
        params: &ParamBuffer,
        target: Target,
    ) -> Result<Self> {
        let adapters = match places.first() {
            None => None,
            Some(first) => Some(Adapters {
                a_ri: params.compute_stacked(first.a_index, places.len())?,
                a_first: first.a_index,
                each: places
                    .iter()
                    .map(|p| {
                        let b_or = params.compute_stacked(p.b_index, 1)?;
                        Ok(Adapter { start: p.start, width: p.width, b_or, b_index: p.b_index })
                    })
                    .collect::<Result<_>>()?,
                r: params.layout().entries()[first.a_index].shape[0],
                scale,
            }),
        };
        Ok(Self { weight, bias_o, adapters, target })
    }

    /// Whether an adapter reads this map's input, and so its dropped form is needed.
    pub fn is_adapted(&self) -> bool {
        self.adapters.is_some()
    }

    /// Computes `y [N, O]` and `s x̃ Aᵀ [N, kR]`, which backward needs.
    pub fn forward(&self, x_ni: &Tensor, dropped_ni: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let mut y_no = self.weight.product(x_ni)?;
        if let Some(bias) = &self.bias_o {
            let _ = y_no.f_add_(bias)?;
        }
        let Some(adapters) = &self.adapters else { return Ok((y_no, None)) };
        let xa_nr = gemm::nt(self.target, dropped_ni, &adapters.a_ri)?;
        xa_nr.f_times_(adapters.scale)?;
        for (adapter, xa_part) in adapters.each.iter().zip(adapters.rank_columns(&xa_nr)?) {
            let y_part = y_no.f_narrow(1, adapter.start, adapter.width)?;
            gemm::add_nt_(self.target, &y_part, &xa_part, &adapter.b_or)?;
        }
        Ok((y_no, Some(xa_nr)))
    }

    /// Computes `dS = s dy B [N, kR]` and accumulates `dB += dyᵀ (s x̃ Aᵀ)`.
    pub fn backward_b(&self, dy_no: &Tensor, xa_nr: Option<&Tensor>, grads: &Gradients) -> Result<Option<Tensor>> {
        let (Some(adapters), Some(xa_nr)) = (&self.adapters, xa_nr) else { return Ok(None) };
        let ds_nr = xa_nr.f_empty_like()?;
        let parts = adapters.rank_columns(xa_nr)?.into_iter().zip(adapters.rank_columns(&ds_nr)?);
        for (adapter, (xa_part, ds_part)) in adapters.each.iter().zip(parts) {
            let dy_part = dy_no.f_narrow(1, adapter.start, adapter.width)?;
            gemm::nn_into_(self.target, &ds_part, &dy_part, &adapter.b_or)?;
            gemm::accumulate_tn_(self.target, &grads.view(adapter.b_index)?, &dy_part, &xa_part)?;
        }
        ds_nr.f_times_(adapters.scale)?;
        Ok(Some(ds_nr))
    }

    /// Computes `dy W`, the gradient of the input through the frozen map.
    pub fn backward_input(&self, dy_no: &Tensor) -> Result<Tensor> {
        self.weight.product_transposed(dy_no)
    }

    /// Adds the adapters' share `drop(dS A)` to the gradient of the input; `drop` applies the input's mask.
    pub fn add_backward_adapters(&self, dx_ni: &mut Tensor, ds_nr: Option<&Tensor>, drop: Option<&Mask>) -> Result<()> {
        let (Some(adapters), Some(ds_nr)) = (&self.adapters, ds_nr) else { return Ok(()) };
        match drop {
            None => gemm::add_nn_(self.target, dx_ni, ds_nr, &adapters.a_ri),
            Some(drop) => {
                let _ = dx_ni.f_add_(&drop(&gemm::nn(self.target, ds_nr, &adapters.a_ri)?)?)?;
                Ok(())
            }
        }
    }

    /// Accumulates `dA += dSᵀ x̃`.
    pub fn backward_a(&self, ds_nr: Option<&Tensor>, dropped_ni: &Tensor, grads: &Gradients) -> Result<()> {
        let (Some(adapters), Some(ds_nr)) = (&self.adapters, ds_nr) else { return Ok(()) };
        gemm::accumulate_tn_(self.target, &grads.stacked(adapters.a_first, adapters.each.len())?, ds_nr, dropped_ni)
    }
}

impl Adapters {
    /// The columns of `[N, kR]` that belong to each adapter.
    fn rank_columns(&self, x_nr: &Tensor) -> Result<Vec<Tensor>> {
        (0..self.each.len() as i64).map(|i| Ok(x_nr.f_narrow(1, i * self.r, self.r)?)).collect()
    }
}
