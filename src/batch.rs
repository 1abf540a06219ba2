//! The packed micro-batch: documents one after the other as plain numbers, and the same on the device.

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::ops::attention::Documents;
use crate::ops::dropout::{DropoutKey, RowOrigin};
use crate::ops::rope::{RopeTable, Rotation};
use crate::torch::transfer;

/// Documents one after the other, without padding. Legend: `N` tokens, `L` learned rows, `B` documents.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedBatch {
    /// `[N]`.
    pub input_ids: Vec<i64>,
    /// `[N]`, from 0 in each document.
    pub position_ids: Vec<i64>,
    /// `[B + 1]`: where each document begins, and the end.
    pub cu_seqlens: Vec<usize>,
    /// `[B]`: each document's place within the update, 0 to the global batch: with it dropout is the same however
    /// documents are packed.
    pub slots: Vec<u64>,
    /// `[L]`: the rows whose next token is learned.
    pub learned_rows: Vec<i64>,
    /// `[L]`: that next token.
    pub targets: Vec<i64>,
    /// `[L]`: the share of each row's loss in the update's loss; they add up to 1 over all its micro-batches.
    pub weights: Vec<f32>,
}

impl PackedBatch {
    /// An empty one, with room for so many tokens and documents.
    pub fn with_capacity(n_tokens: usize, n_documents: usize) -> Self {
        let mut cu_seqlens = Vec::with_capacity(n_documents + 1);
        cu_seqlens.push(0);
        Self {
            input_ids: Vec::with_capacity(n_tokens),
            position_ids: Vec::with_capacity(n_tokens),
            cu_seqlens,
            slots: Vec::with_capacity(n_documents),
            learned_rows: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// How many tokens it has.
    pub fn n_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// How many of them are learned.
    pub fn label_tokens(&self) -> usize {
        self.targets.len()
    }

    /// Puts it on a device.
    ///
    /// # Errors
    /// A document with more tokens than `rope` has positions.
    pub fn upload(&self, rope: &RopeTable, dropout: Option<DropoutKey>, device: Device) -> Result<Batch> {
        let upload = |values: &[i64]| transfer::upload(values, device);
        let position_ids = upload(&self.position_ids)?;
        let longest = self.position_ids.iter().max().map_or(0, |p| p + 1);
        if longest > rope.n_positions() {
            let what = format!("{longest} tokens, but the model was set up for {}", rope.n_positions());
            return Err(Error::failed("a document", what));
        }
        let slots: Vec<i64> = self
            .cu_seqlens
            .windows(2)
            .zip(&self.slots)
            .flat_map(|(bounds, &slot)| std::iter::repeat_n(slot as i64, bounds[1] - bounds[0]))
            .collect();
        Ok(Batch {
            input_ids: upload(&self.input_ids)?,
            rotation: rope.at(&position_ids)?,
            documents: Documents::new(self.cu_seqlens.clone(), device)?,
            origin: RowOrigin { slot_n: upload(&slots)?, token_n: position_ids },
            dropout,
            learned_rows: upload(&self.learned_rows)?,
            targets: upload(&self.targets)?,
            weights: transfer::upload(&self.weights, device)?,
        })
    }
}

/// A packed micro-batch on the device.
#[derive(Debug)]
pub struct Batch {
    /// Token ids `[N]`.
    pub input_ids: Tensor,
    /// Rotations of the rows.
    pub rotation: Rotation,
    /// The documents.
    pub documents: Documents,
    /// The rows' origin, for the dropout masks.
    pub origin: RowOrigin,
    /// The update's dropout, none in evaluation.
    pub dropout: Option<DropoutKey>,
    /// Rows whose next token is learned, ascending `[L]`.
    pub learned_rows: Tensor,
    /// That next token `[L]`.
    pub targets: Tensor,
    /// The share of each row's loss in the update's `[L]`.
    pub weights: Tensor,
}
