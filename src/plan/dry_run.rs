//! A micro-batch's passes with bytes in place of tensors.
//!
//! The functions follow `model/block.rs`, `model/decoder.rs`, `model/adapted_linear.rs` and `ops/` line by line: a tensor there
//! is a [`Held`] here, made where it is made and dropped where it is dropped. Views take nothing. What libtorch's own kernels
//! allocate besides their results is counted where it grows with the tokens; what is the same for all sizes is measured, as
//! part of the workspaces.
//!
//! Legend: `N` tokens, all of them learned; widths are elements a row.

pub(super) mod inference;
mod meter;
mod ops;

use meter::{Bytes, Held, Meter};

use crate::model::decoder::rows_per_chunk;
use crate::model::params::padded_head_rows;
use crate::ops::target::{Form, Target};
use crate::plan::parts::{MemoryPart, PartBytes, Passes, Stage};

/// Bytes of an fp32 element.
const FP32: i64 = 4;

/// Bytes of an i64 element.
const I64: i64 = 8;

/// What cuBLAS and cuBLASLt keep for themselves on a stream: 32 MiB each on the GPUs where it is most.
const CUDA_WORKSPACES: i64 = 64 << 20;

/// What the process itself takes on a CPU besides tensors, above what it had when the model was made: pages of libtorch's code
/// that are first used in a step, the stacks and buffers of threads, scratch of products. Measured (docs/measurements/memory.md).
const CPU_PROCESS: i64 = 28 << 20;

/// What oneDNN and libtorch's layer above it keep of the products that they have made: a description and the code of each. Their
/// number is bounded (`cli/mod.rs`); micro-batches of one size need but a part of it. Measured, as above.
const CPU_PRODUCTS: Products = Products { fp32: [2 << 20, 15 << 20], half: [5 << 20, 44 << 20] };

/// Bytes of remembered products: where micro-batches have one size, and where they differ.
struct Products {
    fp32: [i64; 2],
    half: [i64; 2],
}

/// Philox calls that `ops/dropout.rs` makes at a time on a GPU, and the i64 tensors of that size that it holds while it mixes.
const CUDA_MASK_CALLS: i64 = 1 << 21;
const CUDA_MASK_TENSORS: i64 = 11;

/// The projections of a block that share an input.
#[derive(Debug, Clone)]
pub(super) struct InputGroup {
    /// Columns of the input.
    pub(super) input: i64,
    /// Columns of all outputs.
    pub(super) output: i64,
    /// Columns of each adapted projection's output.
    pub(super) adapted: Vec<i64>,
}

/// What the memory of a run depends on.
#[derive(Debug, Clone)]
pub(super) struct Dims {
    pub(super) hidden: i64,
    pub(super) q_width: i64,
    pub(super) kv_width: i64,
    pub(super) n_heads: i64,
    pub(super) head_dim: i64,
    pub(super) has_head_norms: bool,
    /// Rows of the tables, grown ones included.
    pub(super) vocab: i64,
    pub(super) layers: usize,
    pub(super) max_positions: i64,
    pub(super) rank: i64,
    pub(super) qkv: InputGroup,
    pub(super) o: InputGroup,
    pub(super) gate_up: InputGroup,
    pub(super) down: InputGroup,
    pub(super) drops: bool,
    pub(super) trains_embed: bool,
    pub(super) trains_head: bool,
    pub(super) frozen_params: i64,
    /// Elements of a flat buffer.
    pub(super) buffer_len: i64,
    /// Ranks among which the optimizer's state is shared out.
    pub(super) n_shards: i64,
    /// What the operations are for.
    pub(super) target: Target,
    /// Whether micro-batches differ in size.
    pub(super) sizes_differ: bool,
    pub(super) recompute: bool,
}

impl Dims {
    /// Bytes of an element of weights and activations.
    fn element(&self) -> i64 {
        self.target.kind.elt_size_in_bytes() as i64
    }

    fn is_half_precision(&self) -> bool {
        self.element() < FP32
    }

    /// Whether norms, SwiGLU, RoPE and cross entropy are single passes, and not libtorch's ops one after the other.
    fn has_row_kernels(&self) -> bool {
        self.target.rows() == Form::CpuRows
    }

    fn is_cuda(&self) -> bool {
        self.target.device.is_cuda()
    }

    /// Rows that pad the head.
    fn padding(&self) -> i64 {
        padded_head_rows(self.vocab, self.target.kind) - self.vocab
    }
}

/// Follows one micro-batch of `tokens` tokens.
pub(super) fn passes(dims: &Dims, tokens: i64) -> Passes {
    let meter = Meter::default();
    let dry = DryRun { dims, n: tokens, meter: &meter };
    let _lasting = dry.lasting();
    let lasting = meter.live();
    let _batch = dry.batch();
    meter.take_peak();

    let (hidden, saved) = dry.forward();
    let forward = meter.take_peak();
    let kept = meter.live();
    let dhidden = dry.head_loss();
    drop(hidden);
    let head = meter.take_peak();
    dry.backward(saved, dhidden);
    let backward = meter.take_peak();

    let by_part = |bytes: Bytes| {
        MemoryPart::ALL.into_iter().map(|part| PartBytes { part, bytes: bytes[part as usize] }).collect()
    };
    let peaks =
        [(Stage::Forward, by_part(forward)), (Stage::Head, by_part(head)), (Stage::Backward, by_part(backward))];
    Passes { lasting, kept, peaks }
}

/// `BlockSaved` of `model/block.rs`.
struct BlockSaved<'m> {
    x: Held<'m>,
    gu: Held<'m>,
    x2: Held<'m>,
    qkv: Held<'m>,
    o: Held<'m>,
    /// Statistics of norms and attention, and the adapters' `x Aᵀ`.
    rest: [Option<Held<'m>>; 7],
    head_norms: Vec<Held<'m>>,
}

/// `SavedBlock` of `model/decoder.rs`.
enum SavedBlock<'m> {
    All(Box<BlockSaved<'m>>),
    Input(Held<'m>),
}

/// One micro-batch of `n` tokens.
struct DryRun<'m> {
    dims: &'m Dims,
    n: i64,
    meter: &'m Meter,
}

impl<'m> DryRun<'m> {
    /// `[N, width]` in the compute dtype.
    fn rows(&self, part: MemoryPart, width: i64) -> Held<'m> {
        self.meter.hold(part, self.dims.element() * width * self.n)
    }

    /// `[N, width]` in the compute dtype, gone before the block is left.
    fn passing(&self, width: i64) -> Held<'m> {
        self.rows(MemoryPart::Temporaries, width)
    }

    /// `[N, width]` in fp32.
    fn wide(&self, part: MemoryPart, width: i64) -> Held<'m> {
        self.meter.hold(part, FP32 * width * self.n)
    }

    /// The fp32 form of something passing; in fp32 it is the thing itself.
    fn widened(&self, width: i64) -> Option<Held<'m>> {
        self.dims.is_half_precision().then(|| self.wide(MemoryPart::Temporaries, width))
    }

    // ---- what a run holds ----

    fn lasting(&self) -> Vec<Held<'m>> {
        let dims = self.dims;
        let params = |n: i64| FP32 * n;
        let padding = dims.element() * dims.padding() * dims.hidden;
        let (frozen_padding, copy_padding) = if dims.trains_head { (0, padding) } else { (padding, 0) };
        let copy = if dims.is_half_precision() { dims.element() * dims.buffer_len + copy_padding } else { 0 };
        // Cosines and sines of every position; no document is longer than the micro-batch.
        let rotations = FP32 * dims.head_dim * self.n.min(dims.max_positions);
        let shard_len = (dims.buffer_len + dims.n_shards - 1) / dims.n_shards;
        // Products read the masters themselves in fp32: all of them, then.
        let masters_len = if dims.is_half_precision() { shard_len } else { dims.buffer_len };
        vec![
            self.meter.hold(MemoryPart::FrozenWeights, dims.element() * dims.frozen_params + frozen_padding),
            self.meter.hold(MemoryPart::Masters, params(masters_len)),
            self.meter.hold(MemoryPart::Gradients, params(dims.buffer_len)),
            self.meter.hold(MemoryPart::Moments, 2 * params(shard_len)),
            self.meter.hold(MemoryPart::ComputeCopy, copy),
            self.meter.hold(MemoryPart::Workspaces, self.workspaces()),
            self.meter.hold(MemoryPart::Batch, rotations),
        ]
    }

    /// What the device's libraries hold for themselves.
    fn workspaces(&self) -> i64 {
        if self.dims.is_cuda() {
            return CUDA_WORKSPACES;
        }
        let products = if self.dims.is_half_precision() { CPU_PRODUCTS.half } else { CPU_PRODUCTS.fp32 };
        CPU_PROCESS + products[usize::from(self.dims.sizes_differ)]
    }

    /// `Decoder::batch`: five columns of i64, the weights, the rotations. On the CPU the plain numbers lie there too.
    fn batch(&self) -> Held<'m> {
        let numbers = 5 * I64 + FP32;
        let copies = if self.dims.is_cuda() { 1 } else { 2 };
        self.meter.hold(MemoryPart::Batch, (copies * numbers + FP32 * self.dims.head_dim) * self.n)
    }

    // ---- model/decoder.rs ----

    fn forward(&self) -> (Held<'m>, Vec<SavedBlock<'m>>) {
        let mut x_nd = self.rows(MemoryPart::KeptActivations, self.dims.hidden);
        let mut blocks = Vec::with_capacity(self.dims.layers);
        for _ in 0..self.dims.layers {
            let (out_nd, saved) = self.block_forward(x_nd);
            blocks.push(match self.dims.recompute {
                true => SavedBlock::Input(saved.x),
                false => SavedBlock::All(Box::new(saved)),
            });
            x_nd = out_nd;
        }
        (x_nd, blocks)
    }

    /// `Decoder::head_loss`, all rows learned.
    fn head_loss(&self) -> Held<'m> {
        let d = self.dims.hidden;
        let head = |width: i64| self.rows(MemoryPart::Head, width);
        let _rows_md = head(d);
        let (_h_md, _rstd) = self.rms_norm_forward(MemoryPart::Head);
        let _dh_md = head(d);
        self.head_chunk();
        let _no_residual = head(d);
        let _drows_md = self.rms_norm_backward(MemoryPart::Head).0;
        self.rows(MemoryPart::KeptActivations, d)
    }

    /// One chunk: logits, their gradient, what it gives the rows and the table.
    fn head_chunk(&self) {
        let dims = self.dims;
        let chunk = rows_per_chunk(dims.vocab, dims.target.device).min(self.n);
        let padded = padded_head_rows(dims.vocab, dims.target.kind);
        let hold = |bytes: i64| self.meter.hold(MemoryPart::Head, bytes);
        let logits = hold(dims.element() * padded * chunk);
        let _dlogits = match dims.has_row_kernels() {
            // Overwritten by their gradient.
            true => logits,
            false => {
                // The softmax takes no slice of columns as it lies, and on the CPU nothing but fp32.
                let copied = if dims.is_cuda() { dims.element() * i64::from(padded > dims.vocab) } else { FP32 };
                let copy = hold(copied * dims.vocab * chunk);
                let log_softmax = hold(FP32 * dims.vocab * chunk);
                drop(copy);
                // In fp32 the softmax becomes the gradient, unless the head has padding.
                let dlogits =
                    (dims.is_half_precision() || padded > dims.vocab).then(|| hold(dims.element() * padded * chunk));
                drop(logits);
                dlogits.unwrap_or(log_softmax)
            }
        };
        drop(hold(dims.element() * dims.hidden * chunk));
        if dims.trains_head {
            self.accumulate(MemoryPart::Head, dims.vocab, dims.hidden);
        }
    }

    fn backward(&self, saved: Vec<SavedBlock<'m>>, dhidden_nd: Held<'m>) {
        let mut dx_nd = dhidden_nd;
        for (layer, saved) in saved.into_iter().enumerate().rev() {
            let saved = match saved {
                SavedBlock::All(saved) => *saved,
                SavedBlock::Input(x_nd) => self.block_forward(x_nd).1,
            };
            let need_dx = layer > 0 || self.dims.trains_embed;
            match self.block_backward(saved, dx_nd, need_dx) {
                Some(dx) => dx_nd = dx,
                None => return,
            }
        }
        drop(self.widened(self.dims.hidden));
    }

    // ---- model/block.rs ----

    fn block_forward(&self, x_nd: Held<'m>) -> (Held<'m>, BlockSaved<'m>) {
        let Dims { hidden: d, n_heads, qkv, o: o_group, gate_up, down, .. } = self.dims;
        let (d, kept) = (*d, MemoryPart::KeptActivations);
        let (h_nd, rstd) = self.rms_norm_forward(MemoryPart::Temporaries);
        let (qkv, qkv_xa) = self.linear(qkv, kept);
        drop(h_nd);
        let head_norms = self.head_norms_forward();
        self.rotate();
        let o = self.rows(kept, self.dims.q_width);
        let lse = self.wide(kept, *n_heads);
        self.attention_forward();
        let (x2, o_xa) = self.linear(o_group, kept);

        let (h_nd, mlp_rstd) = self.rms_norm_forward(MemoryPart::Temporaries);
        let (gu, gate_up_xa) = self.linear(gate_up, kept);
        drop(h_nd);
        let _h_nf = self.swiglu_forward();
        let (out_nd, down_xa) = self.linear(down, kept);
        debug_assert_eq!(out_nd.bytes, self.dims.element() * d * self.n);

        let rest = [Some(rstd), qkv_xa, Some(lse), o_xa, Some(mlp_rstd), gate_up_xa, down_xa];
        (out_nd, BlockSaved { x: x_nd, gu, x2, qkv, o, rest, head_norms })
    }

    fn block_backward(&self, saved: BlockSaved<'m>, dout_nd: Held<'m>, need_dx: bool) -> Option<Held<'m>> {
        let Dims { hidden: d, q_width, kv_width, qkv, o, gate_up, down, .. } = self.dims;
        let (d, f) = (*d, down.input);

        let ds = self.backward_b(down);
        let dh_nf = self.backward_input(down);
        self.add_adapters(down);
        let (dgu_n2f, h_nf) = self.swiglu_backward();
        drop((dh_nf, saved.gu));
        self.accumulate_a(down, ds, Some(h_nf));
        debug_assert_eq!(dgu_n2f.bytes, self.dims.element() * 2 * f * self.n);

        let ds = self.backward_b(gate_up);
        let dh_nd = self.backward_input(gate_up);
        drop(dgu_n2f);
        self.add_adapters(gate_up);
        let (dx2_nd, h_nd) = self.rms_norm_backward(MemoryPart::Temporaries);
        drop((dh_nd, dout_nd, saved.x2));
        self.accumulate_a(gate_up, ds, Some(h_nd));

        let ds = self.backward_b(o);
        let do_ = self.backward_input(o);
        self.add_adapters(o);
        self.accumulate_a(o, ds, None);
        let dqkv = self.passing(q_width + 2 * kv_width);
        self.attention_backward();
        drop((do_, saved.qkv, saved.o));
        self.rotate();
        self.head_norms_backward();
        drop(saved.head_norms);

        let ds = self.backward_b(qkv);
        let _held = (saved.x, saved.rest, dx2_nd);
        if !need_dx {
            let h_nd = self.rms_norm_again();
            self.accumulate_a(qkv, ds, Some(h_nd));
            return None;
        }
        let _dh_nd = self.backward_input(qkv);
        drop(dqkv);
        self.add_adapters(qkv);
        let (dx_nd, h_nd) = self.rms_norm_backward(MemoryPart::Temporaries);
        self.accumulate_a(qkv, ds, Some(h_nd));
        debug_assert_eq!(dx_nd.bytes, self.dims.element() * d * self.n);
        Some(dx_nd)
    }

    /// An input with its mask applied. A GPU draws the mask by integer operations, some rows at a time.
    fn dropped(&self, width: i64) -> Option<Held<'m>> {
        if !self.dims.drops {
            return None;
        }
        let dropped = self.rows(MemoryPart::Dropout, width);
        if self.dims.is_cuda() {
            let calls = (self.n * width / 8).min(CUDA_MASK_CALLS);
            drop(self.meter.hold(MemoryPart::Dropout, CUDA_MASK_TENSORS * I64 * calls));
        }
        Some(dropped)
    }

    fn accumulate_a(&self, group: &InputGroup, ds: Option<Held<'m>>, x: Option<Held<'m>>) {
        if ds.is_some() {
            let _dropped = self.dropped(group.input);
            self.accumulate(MemoryPart::Temporaries, self.dims.rank * group.adapted.len() as i64, group.input);
        }
        drop((ds, x));
    }

    // ---- model/adapted_linear.rs ----

    fn linear(&self, group: &InputGroup, part: MemoryPart) -> (Held<'m>, Option<Held<'m>>) {
        let _dropped = if group.adapted.is_empty() { None } else { self.dropped(group.input) };
        let y_no = self.rows(part, group.output);
        if group.adapted.is_empty() {
            return (y_no, None);
        }
        let xa_nr = self.rows(MemoryPart::KeptActivations, self.ranks(group));
        for width in &group.adapted {
            self.add_product(*width);
        }
        (y_no, Some(xa_nr))
    }

    fn backward_b(&self, group: &InputGroup) -> Option<Held<'m>> {
        if group.adapted.is_empty() {
            return None;
        }
        let ds_nr = self.passing(self.ranks(group));
        for width in &group.adapted {
            // oneDNN takes no slice of columns as it lies.
            let is_slice = *width < group.output;
            let copy = (self.is_fp32_on_cpu() && is_slice).then(|| self.passing(*width));
            // A GPU's product goes into its columns of `ds_nr` itself.
            let apart = (!self.dims.is_cuda()).then(|| self.passing(self.dims.rank));
            drop((copy, apart));
            self.accumulate(MemoryPart::Temporaries, *width, self.dims.rank);
        }
        Some(ds_nr)
    }

    fn backward_input(&self, group: &InputGroup) -> Held<'m> {
        self.passing(group.input)
    }

    fn add_adapters(&self, group: &InputGroup) {
        match (group.adapted.is_empty(), self.dims.drops) {
            (true, _) => {}
            (false, true) => drop((self.passing(group.input), self.dropped(group.input))),
            (false, false) => self.add_product(group.input),
        }
    }

    /// Columns of the stacked `x Aᵀ`.
    fn ranks(&self, group: &InputGroup) -> i64 {
        self.dims.rank * group.adapted.len() as i64
    }
}
