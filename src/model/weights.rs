//! The frozen weights of a base model: where they come from, and which there must be.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Fault, Result};
use crate::formats::safetensors_in::TensorFiles;
use crate::model::shape::{ModelShape, Table};
use crate::torch::number::WithNumber;

/// Where the frozen weights of a base come from.
#[derive(Debug, Clone, Copy)]
pub enum BaseWeights<'a> {
    /// The files of a model.
    Files(&'a TensorFiles),
    /// Draws: for measuring a shape without its files.
    Random {
        /// Each tensor's draws depend on this and on its name alone.
        seed: u64,
    },
    /// Tensors in memory, by name: the same on every device.
    Memory(&'a BTreeMap<String, Tensor>),
}

impl BaseWeights<'_> {
    /// Fills `to` with a tensor of the base, in the dtype and on the device of `to`.
    ///
    /// Drawn matrices and biases are N(0, `initializer_range`²), drawn weights of norms ones. They are made
    /// where they stay, by the device's own generator, which begins anew with each: the host holds no copy, and draws
    /// that are made afterwards depend on the seed alone, too.
    ///
    /// # Errors
    /// As [`TensorFiles::copy_into`].
    pub fn fill(self, name: &str, config: &ModelShape, to: &Tensor) -> Result<()> {
        let mut to = to.shallow_clone();
        match self {
            Self::Files(files) => return files.copy_into(name, &to),
            Self::Random { seed } if to.dim() == 2 || name.ends_with(".bias") => {
                // libtorch takes a signed seed; the bits are what counts.
                tch::manual_seed(xxhash_rust::xxh3::xxh3_64_with_seed(name.as_bytes(), seed) as i64);
                let _ = to.f_normal_(0.0, config.initializer_range)?;
            }
            Self::Random { .. } => {
                to.f_fill_with_(1.0)?;
            }
            Self::Memory(tensors) => {
                let tensor =
                    tensors.get(name).ok_or_else(|| Error::failed(name, "is not among the tensors in memory"))?;
                to.f_copy_(tensor)?;
            }
        }
        Ok(())
    }

    /// Makes a tensor of the base.
    ///
    /// # Errors
    /// As [`BaseWeights::fill`].
    pub fn tensor(
        self,
        name: &str,
        shape: &[i64],
        config: &ModelShape,
        (kind, device): (Kind, Device),
    ) -> Result<Tensor> {
        let to = Tensor::f_empty(shape, (kind, device))?;
        self.fill(name, config, &to)?;
        Ok(to)
    }
}

/// Holds the files of a base against the tensors that its configuration asks for: names, shapes and dtypes.
pub fn check_base(files: &TensorFiles, config: &ModelShape) -> Vec<Fault> {
    let expected = config.tensors();
    let mut faults = files.check(
        expected.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())),
        |name| name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == Table::Head.base_key()),
        "does config.json belong to these files, and are they all there? Adapters, quantised weights and other \
         architectures are not supported as a base",
    );
    let (head, embed) = (Table::Head.base_key(), Table::Embed.base_key());
    let stores_another_head = || files.tensors().contains_key(head) && !files.are_alike(head, embed);
    if config.tie_word_embeddings && faults.is_empty() && stores_another_head() {
        let what = "differs from model.embed_tokens.weight, though config.json has tie_word_embeddings = true";
        let fault = Fault::new(files.place(head), what);
        faults.push(fault.hint("set tie_word_embeddings to false in config.json, or remove this tensor"));
    }
    faults
}
