//! A model that only reads: nothing is kept for backward, and there are neither gradients nor moments.

use super::{Bytes, Dims, DryRun, FP32, Held, Meter};
use crate::model::decoder::rows_per_chunk;
use crate::model::params::padded_head_rows;
use crate::plan::parts::{MemoryPart, PartBytes};

/// Follows `Decoder::nll` over a micro-batch of `tokens` tokens, all of them learned.
pub(in crate::plan) fn evaluation(dims: &Dims, tokens: i64) -> Vec<PartBytes> {
    let meter = Meter::default();
    let dry = DryRun { dims, n: tokens, meter: &meter };
    let _lasting = dry.for_reading(tokens);
    let _batch = dry.batch();
    let hidden = dry.hidden();
    let _rows_md = dry.rows(MemoryPart::Head, dims.hidden);
    drop(hidden);
    dry.nll_chunk();
    by_part(meter.take_peak())
}

/// Follows `generate`: a prompt, then one token at a time, over a cache of the keys and values of `positions` tokens.
pub(in crate::plan) fn generation(dims: &Dims, prompt: i64, positions: i64) -> Vec<PartBytes> {
    let meter = Meter::default();
    let dry = DryRun { dims, n: prompt, meter: &meter };
    let _lasting = dry.for_reading(positions);
    let cached = 2 * dims.kv_width * dims.layers as i64 * positions;
    let _cache = meter.hold(MemoryPart::KeptActivations, dims.element() * cached);
    let hidden = dry.hidden();
    drop(hidden);
    drop(meter.hold(MemoryPart::Head, (dims.element() + 2 * FP32) * dims.vocab));
    by_part(meter.take_peak())
}

fn by_part(bytes: Bytes) -> Vec<PartBytes> {
    MemoryPart::ALL.into_iter().map(|part| PartBytes { part, bytes: bytes[part as usize] }).collect()
}

impl<'m> DryRun<'m> {
    /// The weights, and the rotations of so many positions. In half precision the masters are dropped before the base is read.
    fn for_reading(&self, positions: i64) -> Vec<Held<'m>> {
        let dims = self.dims;
        let is_half = dims.is_half_precision();
        let padding = if dims.trains_head { 0 } else { dims.element() * dims.padding() * dims.hidden };
        let copy_padding = if dims.trains_head { dims.element() * dims.padding() * dims.hidden } else { 0 };
        let (masters, copy) = match is_half {
            true => (0, dims.element() * dims.buffer_len + copy_padding),
            false => (FP32 * dims.buffer_len, 0),
        };
        vec![
            self.meter.hold(MemoryPart::FrozenWeights, dims.element() * dims.frozen_params + padding),
            self.meter.hold(MemoryPart::Masters, masters),
            self.meter.hold(MemoryPart::ComputeCopy, copy),
            self.meter.hold(MemoryPart::Workspaces, self.workspaces()),
            self.meter.hold(MemoryPart::Batch, FP32 * dims.head_dim * positions.min(dims.max_positions)),
        ]
    }

    /// `Decoder::hidden`: what each block would keep goes with the block.
    fn hidden(&self) -> Held<'m> {
        let x_nd = self.rows(MemoryPart::Temporaries, self.dims.hidden);
        self.block_forward(x_nd).0
    }

    /// One chunk of `Decoder::nll`: the normed rows, their logits, the softmax in fp32.
    fn nll_chunk(&self) {
        let dims = self.dims;
        let chunk = rows_per_chunk(dims.vocab, dims.target.device).min(self.n);
        let padded = padded_head_rows(dims.vocab, dims.target.kind);
        let hold = |bytes: i64| self.meter.hold(MemoryPart::Head, bytes);
        let _h_md = hold(dims.element() * dims.hidden * chunk);
        let _logits = hold(dims.element() * padded * chunk);
        let is_copied = dims.is_half_precision() || padded > dims.vocab;
        let _copy = hold(FP32 * i64::from(is_copied) * dims.vocab * chunk);
        let _log_softmax = hold(FP32 * dims.vocab * chunk);
    }
}
