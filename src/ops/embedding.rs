//! Embedding look-up and the gradient of its table.

use tch::Tensor;

use crate::error::Result;

/// Gathers the rows `ids_n` of the table: `[V, D] -> [N, D]`.
pub fn forward(table_vd: &Tensor, ids_n: &Tensor) -> Result<Tensor> {
    Ok(table_vd.f_index_select(0, ids_n)?)
}

/// Adds the rows of `dx_nd` to the gradient rows of their ids, in the order of the tokens.
pub fn backward_(dtable_vd: &Tensor, ids_n: &Tensor, dx_nd: &Tensor) -> Result<()> {
    let dx = dx_nd.f_to_kind(dtable_vd.kind())?;
    let _ = dtable_vd.shallow_clone().f_index_add_(0, ids_n, &dx)?;
    Ok(())
}
