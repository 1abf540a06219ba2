//! The operations of `ops/` with bytes in place of tensors.

use tch::Kind;

use super::{Dims, DryRun, FP32, Held};
use crate::ops::attention::ROWS_PER_RUN;
use crate::plan::parts::MemoryPart;

/// What attention's backward on a GPU holds in fp32, as multiples of the queries' width. The memory-efficient kernel sums
/// the gradients of q, k and v there; flash attention that of q and a number for every head, with 128 rows more for every document
/// (`dq_accum` and `softmax_d` of `mha_varlen_bwd`), and documents are taken to have 64 tokens or more on average.
const CUDA_ACCUMULATORS: i64 = 3;

impl<'m> DryRun<'m> {
    // ---- ops/gemm.rs ----

    pub(super) fn is_fp32_on_cpu(&self) -> bool {
        !self.dims.is_cuda() && self.dims.target.kind == Kind::Float
    }

    /// `add_nt_` or `add_nn_` onto `[N, width]`.
    pub(super) fn add_product(&self, width: i64) {
        if self.dims.is_half_precision() && !self.dims.is_cuda() {
            drop(self.passing(width));
        }
    }

    /// `accumulate_tn_` onto a gradient `[rows, columns]`.
    pub(super) fn accumulate(&self, part: MemoryPart, rows: i64, columns: i64) {
        // A GPU's product goes into the fp32 gradient itself.
        if self.dims.is_half_precision() && !self.dims.is_cuda() {
            drop(self.meter.hold(part, self.dims.element() * rows * columns));
        }
    }

    // ---- ops/rms_norm.rs ----

    /// The normed rows and their statistics, which alone are kept.
    pub(super) fn rms_norm_forward(&self, part: MemoryPart) -> (Held<'m>, Held<'m>) {
        let kept = if part == MemoryPart::Head { part } else { MemoryPart::KeptActivations };
        self.norms_forward(part, kept, self.dims.hidden, 1)
    }

    /// `width` columns of each row, in which so many norms lie side by side.
    fn norms_forward(&self, part: MemoryPart, kept: MemoryPart, d: i64, n_norms: i64) -> (Held<'m>, Held<'m>) {
        let rstd = self.wide(kept, n_norms);
        if self.dims.has_row_kernels() {
            return (self.rows(part, d), rstd);
        }
        let _x = self.widened(d);
        drop(self.wide(MemoryPart::Temporaries, d));
        let _scaled = [self.wide(MemoryPart::Temporaries, d), self.wide(MemoryPart::Temporaries, d)];
        (self.rows(part, d), rstd)
    }

    /// The gradient of the rows, and the normed rows again.
    pub(super) fn rms_norm_backward(&self, part: MemoryPart) -> (Held<'m>, Held<'m>) {
        self.norms_backward(part, self.dims.hidden)
    }

    fn norms_backward(&self, part: MemoryPart, d: i64) -> (Held<'m>, Held<'m>) {
        if self.dims.has_row_kernels() {
            return (self.rows(part, d), self.rows(part, d));
        }
        let wide = || self.wide(MemoryPart::Temporaries, d);
        let _x = self.widened(d);
        let dy = self.widened(d);
        let _g = wide();
        drop(dy);
        let terms = [wide(), wide()];
        let _dx = wide();
        drop(terms);
        let _sum = wide();
        let dx = self.rows(part, d);
        (dx, self.norms_again(part, d))
    }

    pub(super) fn rms_norm_again(&self) -> Held<'m> {
        self.norms_again(MemoryPart::Temporaries, self.dims.hidden)
    }

    /// `recompute`, which is made of libtorch's ops everywhere.
    fn norms_again(&self, part: MemoryPart, d: i64) -> Held<'m> {
        let _x = self.widened(d);
        let _scaled = [self.wide(MemoryPart::Temporaries, d), self.wide(MemoryPart::Temporaries, d)];
        self.rows(part, d)
    }

    // ---- model/head_norms.rs ----

    /// The heads of queries and keys as they were, and their statistics.
    pub(super) fn head_norms_forward(&self) -> Vec<Held<'m>> {
        let kept = MemoryPart::KeptActivations;
        let norm = |width: i64| {
            let x = self.rows(kept, width);
            let (_y, rstd) = self.norms_forward(MemoryPart::Temporaries, kept, width, width / self.dims.head_dim);
            [x, rstd]
        };
        self.head_norm_widths().flat_map(norm).collect()
    }

    pub(super) fn head_norms_backward(&self) {
        for width in self.head_norm_widths() {
            let _dy_and_no_residual = self.passing(2 * width);
            drop(self.norms_backward(MemoryPart::Temporaries, width));
        }
    }

    /// Columns of what is normed a head at a time.
    fn head_norm_widths(&self) -> impl Iterator<Item = i64> {
        let widths = [self.dims.q_width, self.dims.kv_width];
        widths.into_iter().filter(|_| self.dims.has_head_norms)
    }

    // ---- ops/rope.rs, ops/swiglu.rs ----

    pub(super) fn rotate(&self) {
        if self.dims.has_row_kernels() {
            return;
        }
        let half = (self.dims.q_width + self.dims.kv_width) / 2;
        let _halves = [self.widened(half), self.widened(half)];
        // Four products and two sums, none freed before the last is made.
        let _made = [(); 6].map(|()| self.wide(MemoryPart::Temporaries, half));
    }

    pub(super) fn swiglu_forward(&self) -> Held<'m> {
        let f = self.dims.down.input;
        let _silu = (!self.dims.has_row_kernels()).then(|| self.passing(f));
        self.passing(f)
    }

    pub(super) fn swiglu_backward(&self) -> (Held<'m>, Held<'m>) {
        let f = self.dims.down.input;
        if self.dims.has_row_kernels() {
            return (self.passing(2 * f), self.passing(f));
        }
        let _silu = self.passing(f);
        let dgu = self.passing(2 * f);
        drop([self.passing(f), self.passing(f)]);
        (dgu, self.passing(f))
    }

    // ---- ops/attention.rs ----

    /// What attention makes besides the `o` and `lse` that are kept.
    pub(super) fn attention_forward(&self) {
        if self.dims.is_cuda() {
            drop(self.repeated());
        } else {
            let _inputs = self.cpu_attention_inputs();
            drop(self.in_run(self.dims.q_width));
        }
    }

    /// Gradients of q, k and v apart, before they go into `dqkv`.
    pub(super) fn attention_backward(&self) {
        let Dims { q_width, kv_width, n_heads, .. } = *self.dims;
        let is_grouped = q_width > kv_width;
        if self.dims.is_cuda() {
            let _repeated = self.repeated();
            let _apart = self.passing(3 * q_width);
            drop(self.wide(MemoryPart::Temporaries, CUDA_ACCUMULATORS * (q_width + n_heads)));
            if is_grouped {
                // The sums over the groups in fp32, rounded.
                let _sums = self.passing(2 * kv_width);
                drop(self.wide(MemoryPart::Temporaries, kv_width));
            }
            return;
        }
        let _inputs = self.cpu_attention_inputs();
        let outer = self.dims.is_half_precision().then(|| self.in_run(2 * q_width));
        let _apart = self.in_run(3 * q_width);
        drop(outer);
        if is_grouped {
            // The sums over the groups, and the same as rows.
            let _sums = [self.in_run(2 * kv_width), self.in_run(2 * kv_width)];
        }
    }

    /// q, k and v of a run of documents where they do not serve as they lie: widened, or repeated for their group of query
    /// heads.
    fn cpu_attention_inputs(&self) -> Held<'m> {
        let Dims { q_width, kv_width, .. } = *self.dims;
        self.in_run(match (self.dims.is_half_precision(), q_width > kv_width) {
            (true, _) => 3 * q_width,
            (false, true) => 2 * q_width,
            (false, false) => 0,
        })
    }

    /// Rows in fp32 of as many documents as the CPU's kernel takes at once. (A longer document is taken alone, and whole.)
    fn in_run(&self, width: i64) -> Held<'m> {
        self.meter.hold(MemoryPart::Temporaries, FP32 * width * self.n.min(ROWS_PER_RUN))
    }

    /// Keys and values repeated for their group of query heads, as one of a GPU's two kernels wants them.
    fn repeated(&self) -> Option<Held<'m>> {
        let Dims { q_width, kv_width, .. } = *self.dims;
        (q_width > kv_width).then(|| self.passing(2 * q_width))
    }
}
