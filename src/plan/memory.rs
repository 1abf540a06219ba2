//! The memory of a training run, by part, as a function of the tokens in a micro-batch.
//!
//! Every number is derived from what the engine allocates and keeps: see `dry_run`. Bytes are those that the program asks
//! for, and the device's workspaces; how an allocator rounds them and what it cannot reuse is the business of the margin in
//! [`super::solve`].

use tch::{Device, Kind};

use crate::engine::probe::Expected;
use crate::model::lora::LoraSpec;
use crate::model::params::{INPUT_GROUPS, Layout, table_key};
use crate::model::shape::{ModelShape, Projection, Table};
use crate::ops::target::Target;
use crate::plan::dry_run::{self, Dims, InputGroup, inference};
use crate::plan::parts::{PartBytes, Passes, sum};

/// The memory of a run, for every size of its micro-batches.
///
/// It grows with the tokens in straight lines: what is kept and the widest temporaries are so many bytes a token, the
/// logits alone come in chunks that stop growing. The worst case is assumed where samples differ: every position learned,
/// all documents of one length (so that attention takes them in one call).
#[derive(Debug, Clone)]
pub struct MemoryModel {
    dims: Dims,
}

impl MemoryModel {
    /// Takes down what the memory of a run depends on; `layout` is that of its trained parameters.
    pub fn new(
        shape: &ModelShape,
        lora: &LoraSpec,
        layout: &Layout,
        kind: Kind,
        device: Device,
        recompute: bool,
    ) -> Self {
        let heads = shape.heads();
        let group = |projections: &[Projection]| InputGroup {
            input: projections[0].shape(shape)[1],
            output: projections.iter().map(|p| p.shape(shape)[0]).sum(),
            adapted: projections.iter().filter(|p| lora.adapts(**p)).map(|p| p.shape(shape)[0]).collect(),
        };
        let [qkv, o, gate_up, down] = INPUT_GROUPS.map(group);
        let table = layout.index_of(&table_key(Table::Head)).map(|index| layout.entries()[index].shape[0]);
        let dims = Dims {
            hidden: shape.hidden_size,
            q_width: heads.q_width(),
            kv_width: heads.kv_width(),
            n_heads: heads.n_heads,
            head_dim: heads.head_dim,
            has_head_norms: shape.has_head_norms,
            vocab: table.unwrap_or(shape.vocab_size),
            layers: shape.num_hidden_layers,
            max_positions: shape.max_position_embeddings,
            rank: lora.r,
            qkv,
            o,
            gate_up,
            down,
            drops: lora.dropout > 0.0,
            trains_embed: lora.trains(Table::Embed),
            trains_head: lora.trains(Table::Head),
            frozen_params: frozen_params(shape, lora),
            buffer_len: layout.buffer_len(),
            n_shards: 1,
            // Of a GPU the most that any of them takes is counted, whatever its capability.
            target: Target { device, kind, capability: (0, 0) },
            sizes_differ: true,
            recompute,
        };
        Self { dims }
    }

    /// The memory of a run whose micro-batches all have one size, as where all samples are equally long. A CPU's libraries then
    /// remember fewer products.
    #[must_use]
    pub fn of_equal_micro_batches(mut self) -> Self {
        self.dims.sizes_differ = false;
        self
    }

    /// The memory of each of so many ranks among which the optimizer's state is shared out.
    #[must_use]
    pub fn sharded(mut self, n_ranks: usize) -> Self {
        self.dims.n_shards = n_ranks as i64;
        self
    }

    /// Runs a micro-batch of so many tokens without running it.
    pub fn passes(&self, tokens: i64) -> Passes {
        dry_run::passes(&self.dims, tokens)
    }

    /// The same as what a real micro-batch is held against.
    pub fn expected(&self, tokens: usize) -> Expected {
        self.passes(tokens as i64).into()
    }

    /// The bytes of every part at the peak of a step, for micro-batches of so many tokens; they add up to [`Self::total`].
    pub fn by_part(&self, tokens: i64) -> Vec<PartBytes> {
        let peaks = self.passes(tokens).peaks;
        peaks.into_iter().map(|(_, parts)| parts).max_by_key(|parts| sum(parts)).unwrap_or_default()
    }

    /// The peak of a step, for micro-batches of so many tokens.
    pub fn total(&self, tokens: i64) -> i64 {
        sum(&self.by_part(tokens))
    }

    /// What an evaluation takes, by part, whose micro-batches hold so many tokens.
    pub fn evaluation(&self, tokens: i64) -> Vec<PartBytes> {
        inference::evaluation(&self.reading(), tokens)
    }

    /// What generation takes, by part, for a prompt of so many tokens in a text of at most `positions`.
    pub fn generation(&self, prompt: i64, positions: i64) -> Vec<PartBytes> {
        inference::generation(&self.reading(), prompt, positions)
    }

    /// The same without what training alone does.
    fn reading(&self) -> Dims {
        Dims { drops: false, ..self.dims.clone() }
    }

    /// What a run holds whatever its micro-batches are.
    pub fn lasting(&self) -> i64 {
        self.passes(0).lasting
    }
}

/// Parameters of the frozen base, tables that are trained apart.
pub fn frozen_params(shape: &ModelShape, lora: &LoraSpec) -> i64 {
    let is_table = |name: &str| Table::ALL.iter().any(|table| table.base_key() == name);
    let others = shape.tensors().into_iter().filter(|(name, _)| !is_table(name));
    let others: i64 = others.map(|(_, dims)| dims.iter().product::<i64>()).sum();
    let table = shape.vocab_size * shape.hidden_size;
    let frozen = Table::ALL.iter().filter(|t| !lora.trains(**t)).count() as i64;
    let tables = if shape.tie_word_embeddings { frozen.min(1) } else { frozen };
    others + tables * table
}
