//! What the trainable parameters begin as.

use tch::{Device, Kind, Tensor};

use crate::choice::choice;
use crate::error::Result;
use crate::model::lora::LoraSpec;
use crate::model::params::{ParamBuffer, table_key};
use crate::model::shape::{ModelShape, Table};
use crate::model::weights::BaseWeights;

choice! {
    /// What the rows of a grown vocabulary begin as.
    NewRows {
        /// Draws from N(0, `initializer_range`).
        Normal = "normal",
        /// The mean of the old rows.
        Mean = "mean",
    }
}

/// Sets all parameters to their start: `lora_A` Kaiming-uniform, `lora_B` zero, tables from the base.
///
/// `lora_A` has the bound `1 / sqrt(in_features)`: Kaiming's with a = sqrt(5), as PEFT draws it. Draws come from
/// libtorch's generator on the CPU, seeded anew, tensor by tensor in the order of the buffer.
pub fn initialise(
    params: &mut ParamBuffer,
    config: &ModelShape,
    lora: &LoraSpec,
    base: BaseWeights<'_>,
    new_rows: NewRows,
    seed: u64,
) -> Result<()> {
    // libtorch takes a signed seed; the bits are what counts.
    tch::manual_seed(seed as i64);
    for (index, entry) in params.layout().entries().iter().enumerate() {
        let mut tensor = params.master_view(index)?;
        let cpu = (Kind::Float, Device::Cpu);
        match lora.modules_to_save.iter().find(|t| table_key(**t) == entry.name) {
            Some(table) => fill_table(&tensor, *table, config, base, new_rows)?,
            None if entry.name.contains("lora_A") => {
                let bound = 1.0 / (entry.shape[1] as f64).sqrt();
                tensor.f_copy_(&Tensor::f_empty(entry.shape, cpu)?.f_uniform_(-bound, bound)?)?;
            }
            None => {
                let _ = tensor.f_zero_()?;
            }
        }
    }
    params.refresh_compute()
}

/// Copies the base's rows and makes the grown ones. The head of a tied base begins as the embedding table.
fn fill_table(
    tensor: &Tensor,
    table: Table,
    config: &ModelShape,
    base: BaseWeights<'_>,
    new_rows: NewRows,
) -> Result<()> {
    let source = if config.tie_word_embeddings { Table::Embed } else { table };
    let old = tensor.f_narrow(0, 0, config.vocab_size)?;
    base.fill(source.base_key(), config, &old)?;
    let n_new = tensor.size()[0] - config.vocab_size;
    if n_new == 0 {
        return Ok(());
    }
    let mut new = tensor.f_narrow(0, config.vocab_size, n_new)?;
    match new_rows {
        NewRows::Normal => {
            let draws = Tensor::f_empty(new.size(), (Kind::Float, Device::Cpu))?;
            new.f_copy_(&draws.shallow_clone().f_normal_(0.0, config.initializer_range)?)?;
        }
        NewRows::Mean => new.f_copy_(&old.f_mean_dim(0i64, true, Kind::Float)?)?,
    }
    Ok(())
}
