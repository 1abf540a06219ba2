//! Causal self-attention within the documents of a packed micro-batch.
//!
//! Queries, keys and values stay where the fused projection put them: `qkv [N, (H + 2K) E]`. Which kernel attends depends
//! on the device, the dtype and the width of a head; a plain form by libtorch's common ops serves where none fits, and
//! judges the others.

use tch::{Device, Kind, Tensor};

use crate::device;
use crate::error::Result;
use crate::ops::target::Target;
use crate::torch::cuda::{self, Qkv};
use crate::torch::number::WithNumber;
use crate::torch::transfer::upload;

/// The head layout of a fused `qkv` row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads `H`.
    pub n_heads: i64,
    /// Key and value heads `K`; divides `H`.
    pub n_kv_heads: i64,
    /// Width of a head `E`.
    pub head_dim: i64,
}

impl Heads {
    /// Columns of the queries, `H E`.
    pub fn q_width(&self) -> i64 {
        self.n_heads * self.head_dim
    }

    /// Columns of the keys (or the values), `K E`.
    pub fn kv_width(&self) -> i64 {
        self.n_kv_heads * self.head_dim
    }

    /// Columns of a fused row.
    pub fn qkv_width(&self) -> i64 {
        self.q_width() + 2 * self.kv_width()
    }

    /// The query and key columns as `[N, H + K, E]`: what RoPE turns.
    pub fn rotated(&self, qkv: &Tensor) -> Result<Tensor> {
        let (n, heads) = (qkv.size()[0], self.n_heads + self.n_kv_heads);
        Ok(qkv.f_narrow(1, 0, heads * self.head_dim)?.f_view([n, heads, self.head_dim])?)
    }
}

/// Rows that the CPU's kernel takes in one call: enough to keep many threads busy, few enough that what it makes on the way is
/// small beside what is kept.
pub const ROWS_PER_RUN: i64 = 1024;

/// The documents of a packed micro-batch, one behind the other.
#[derive(Debug)]
pub struct Documents {
    cu_seqlens: Vec<usize>,
    longest: i64,
    /// The borders as int32 on a GPU, where its kernels read them.
    on_device: Option<Tensor>,
}

impl Documents {
    /// Takes the documents' borders in rows, from 0 to N; on a GPU they are uploaded.
    pub fn new(cu_seqlens: Vec<usize>, device: Device) -> Result<Self> {
        let longest = cu_seqlens.windows(2).map(|bounds| bounds[1] - bounds[0]).max().unwrap_or(0) as i64;
        let on_device = match device.is_cuda() {
            true => {
                let borders: Vec<i32> = cu_seqlens.iter().map(|&border| border as i32).collect();
                Some(upload(&borders, device)?)
            }
            false => None,
        };
        Ok(Self { cu_seqlens, longest, on_device })
    }

    /// First row and length of each document that has any.
    fn each(&self) -> impl Iterator<Item = (i64, i64)> {
        let bounds = self.cu_seqlens.windows(2).map(|bounds| (bounds[0] as i64, (bounds[1] - bounds[0]) as i64));
        bounds.filter(|(_, len)| *len > 0)
    }

    /// The documents in runs of equal length, a run no longer than [`ROWS_PER_RUN`] unless it is a single document.
    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (start, len) in self.each() {
            match runs.last_mut() {
                Some(run) if run.len == len && (run.n_docs + 1) * len <= ROWS_PER_RUN => run.n_docs += 1,
                _ => runs.push(Run { start, n_docs: 1, len }),
            }
        }
        runs
    }
}

/// A run of adjoining documents of equal length: they are one call of the CPU's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: i64,
    n_docs: i64,
    len: i64,
}

/// The forms of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// libtorch's flash attention for CPUs, a run of equal documents at a time.
    Cpu,
    /// Flash attention over packed documents.
    Flash,
    /// Memory-efficient attention over packed documents.
    Efficient,
    /// libtorch's common ops, a document at a time.
    Plain,
}

impl Kernel {
    /// The quickest form for a target and a width of heads.
    pub fn choose(target: Target, head_dim: i64) -> Self {
        if target.is_cpu() {
            return Self::Cpu;
        }
        // Both GPU kernels load eight elements at a time.
        let is_aligned = head_dim % 8 == 0;
        let has_bf16 = target.capability >= device::BF16_CAPABILITY;
        match target.kind {
            _ if !target.device.is_cuda() || !is_aligned => Self::Plain,
            Kind::Half | Kind::BFloat16 if has_bf16 && head_dim <= 256 => Self::Flash,
            Kind::BFloat16 if !has_bf16 => Self::Plain,
            Kind::Half | Kind::BFloat16 | Kind::Float => Self::Efficient,
            _ => Self::Plain,
        }
    }
}

/// What backward needs besides `qkv` and `o`: the log-sum-exp of every query, as the kernel that attended lays it out.
#[derive(Debug)]
pub enum AttentionSaved {
    /// A tensor a run of documents.
    Cpu(Vec<Tensor>),
    /// `[H, N]`.
    Flash(Tensor),
    /// `[documents, H, longest rounded up]`.
    Efficient(Tensor),
    /// Nothing: backward attends again.
    Plain,
}

/// Attends within each document. Returns `o [N, H E]`.
pub fn forward(target: Target, qkv: &Tensor, heads: Heads, documents: &Documents) -> Result<(Tensor, AttentionSaved)> {
    match (Kernel::choose(target, heads.head_dim), &documents.on_device) {
        (Kernel::Cpu, _) => cpu_forward(qkv, heads, documents),
        (Kernel::Flash, Some(cu_seqlens)) => {
            let Parts { q, k, v } = Parts::of(qkv, heads)?;
            let inputs = Qkv { q: &q, k: &k, v: &v, cu_seqlens, longest: documents.longest };
            let (o_nhe, lse) = cuda::flash_forward(inputs)?;
            Ok((o_nhe.f_reshape([-1, heads.q_width()])?, AttentionSaved::Flash(lse)))
        }
        (Kernel::Efficient, Some(cu_seqlens)) => {
            let Parts { q, k, v } = Parts::of(qkv, heads)?.repeated(heads)?.as_one_row()?;
            let inputs = Qkv { q: &q, k: &k, v: &v, cu_seqlens, longest: documents.longest };
            let (o_1nhe, lse) = cuda::efficient_forward(inputs)?;
            Ok((o_1nhe.f_reshape([-1, heads.q_width()])?, AttentionSaved::Efficient(lse)))
        }
        _ => Ok((plain_forward(qkv, heads, documents)?, AttentionSaved::Plain)),
    }
}

/// Computes the gradient of `qkv` from that of `o`.
pub fn backward(
    do_: &Tensor,
    qkv: &Tensor,
    o: &Tensor,
    heads: Heads,
    documents: &Documents,
    saved: &AttentionSaved,
) -> Result<Tensor> {
    let as_nhe = |t: &Tensor| -> Result<Tensor> { Ok(t.f_reshape([-1, heads.n_heads, heads.head_dim])?) };
    match (saved, &documents.on_device) {
        (AttentionSaved::Cpu(lse), _) => cpu_backward(do_, qkv, o, heads, documents, lse),
        (AttentionSaved::Flash(lse), Some(cu_seqlens)) => {
            let Parts { q, k, v } = Parts::of(qkv, heads)?;
            let inputs = Qkv { q: &q, k: &k, v: &v, cu_seqlens, longest: documents.longest };
            let [dq, dk, dv] = cuda::flash_backward(&as_nhe(do_)?, inputs, &as_nhe(o)?, lse)?;
            let dqkv = qkv.f_empty_like()?;
            join_into(&dqkv, heads, &dq, &dk, &dv)?;
            Ok(dqkv)
        }
        (AttentionSaved::Efficient(lse), Some(cu_seqlens)) => {
            let Parts { q, k, v } = Parts::of(qkv, heads)?.repeated(heads)?.as_one_row()?;
            let inputs = Qkv { q: &q, k: &k, v: &v, cu_seqlens, longest: documents.longest };
            let (do_1nhe, o_1nhe) = (as_nhe(do_)?.f_unsqueeze(0)?, as_nhe(o)?.f_unsqueeze(0)?);
            let [dq, dk, dv] = cuda::efficient_backward(&do_1nhe, inputs, &o_1nhe, lse)?;
            let dqkv = qkv.f_empty_like()?;
            join_into(&dqkv, heads, &dq, &ungroup(dk, 2, heads)?, &ungroup(dv, 2, heads)?)?;
            Ok(dqkv)
        }
        _ => plain_backward(do_, qkv, o, heads, documents),
    }
}

/// The parts of fused rows, `[N, heads, E]` each, where they lie.
struct Parts {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Parts {
    fn of(qkv: &Tensor, heads: Heads) -> Result<Self> {
        let part = |start: i64, n_heads: i64| -> Result<Tensor> {
            let columns = qkv.f_narrow(1, start, n_heads * heads.head_dim)?;
            Ok(columns.f_view([qkv.size()[0], n_heads, heads.head_dim])?)
        };
        Ok(Self {
            q: part(0, heads.n_heads)?,
            k: part(heads.q_width(), heads.n_kv_heads)?,
            v: part(heads.q_width() + heads.kv_width(), heads.n_kv_heads)?,
        })
    }

    /// Keys and values repeated for every query head of their group.
    fn repeated(self, heads: Heads) -> Result<Self> {
        let Self { q, k, v } = self;
        Ok(Self { q, k: repeat(k, 1, heads)?, v: repeat(v, 1, heads)? })
    }

    /// All with a leading 1.
    fn as_one_row(&self) -> Result<Self> {
        Ok(Self { q: self.q.f_unsqueeze(0)?, k: self.k.f_unsqueeze(0)?, v: self.v.f_unsqueeze(0)? })
    }
}

/// Puts the gradients of the three parts where the rows of `dqkv` have them.
fn join_into(dqkv: &Tensor, heads: Heads, dq: &Tensor, dk: &Tensor, dv: &Tensor) -> Result<()> {
    let mut start = 0;
    for (part, width) in [(dq, heads.q_width()), (dk, heads.kv_width()), (dv, heads.kv_width())] {
        dqkv.f_narrow(1, start, width)?.f_copy_(&part.f_reshape([-1, width])?)?;
        start += width;
    }
    Ok(())
}

/// Repeats key or value heads, which stand at `dim`, for every query head of their group.
fn repeat(heads_of_k: Tensor, dim: i64, heads: Heads) -> Result<Tensor> {
    match heads.n_heads / heads.n_kv_heads {
        1 => Ok(heads_of_k),
        group => Ok(heads_of_k.f_repeat_interleave_self_int(group, dim, None)?),
    }
}

/// Sums the gradients of repeated key or value heads, which stand at `dim`, over their group, in fp32 or wider.
fn ungroup(dk: Tensor, dim: i64, heads: Heads) -> Result<Tensor> {
    if heads.n_heads == heads.n_kv_heads {
        return Ok(dk);
    }
    let (kind, size) = (dk.kind(), dk.size());
    let (before, after) = (&size[..dim as usize], &size[dim as usize + 1..]);
    let grouped = [before, &[heads.n_kv_heads, heads.n_heads / heads.n_kv_heads], after].concat();
    Ok(dk.f_reshape(grouped)?.f_sum_dim_intlist(dim + 1, false, wide(kind))?.f_to_kind(kind)?)
}

/// The dtype in which sums are kept.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

// ---- the CPU's kernel ----

/// One run's queries, keys and values, `[B, H, T, E]` in fp32 or wider; keys and values repeated for their group of query heads.
///
/// In bf16 the kernel has oneDNN make products of its own for every length of a document that it meets. Where lengths differ that
/// takes time, and what is kept of them grows to hundreds of megabytes.
fn run_parts(qkv: &Tensor, heads: Heads, run: Run) -> Result<Parts> {
    let Parts { q, k, v } = Parts::of(&qkv.f_narrow(0, run.start, run.n_docs * run.len)?, heads)?;
    let as_bhte = |x: Tensor, n_heads: i64| -> Result<Tensor> {
        let x_bthe = x.f_view([run.n_docs, run.len, n_heads, heads.head_dim])?;
        Ok(x_bthe.f_to_kind(wide(x.kind()))?.f_transpose(1, 2)?)
    };
    Ok(Parts {
        q: as_bhte(q, heads.n_heads)?,
        k: repeat(as_bhte(k, heads.n_kv_heads)?, 1, heads)?,
        v: repeat(as_bhte(v, heads.n_kv_heads)?, 1, heads)?,
    })
}

/// `[B, H, T, E]` to rows `[B T, H E]`.
fn rows(x_bhte: &Tensor) -> Result<Tensor> {
    let size = x_bhte.size();
    Ok(x_bhte.f_transpose(1, 2)?.f_reshape([size[0] * size[2], size[1] * size[3]])?)
}

fn cpu_forward(qkv: &Tensor, heads: Heads, documents: &Documents) -> Result<(Tensor, AttentionSaved)> {
    let o = Tensor::f_empty([qkv.size()[0], heads.q_width()], (qkv.kind(), qkv.device()))?;
    let mut lse = Vec::new();
    for run in documents.runs() {
        let Parts { q, k, v } = run_parts(qkv, heads, run)?;
        let (o_bhte, lse_bht) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &q,
            &k,
            &v,
            0.0,
            true,
            None::<&Tensor>,
            None,
        )?;
        o.f_narrow(0, run.start, run.n_docs * run.len)?.f_copy_(&rows(&o_bhte)?)?;
        lse.push(lse_bht);
    }
    Ok((o, AttentionSaved::Cpu(lse)))
}

fn cpu_backward(
    do_: &Tensor,
    qkv: &Tensor,
    o: &Tensor,
    heads: Heads,
    documents: &Documents,
    lse: &[Tensor],
) -> Result<Tensor> {
    let dqkv = qkv.f_empty_like()?;
    for (run, lse_bht) in documents.runs().into_iter().zip(lse) {
        let n_rows = run.n_docs * run.len;
        let Parts { q, k, v } = run_parts(qkv, heads, run)?;
        let as_bhte = |t: &Tensor| -> Result<Tensor> {
            let rows = t.f_narrow(0, run.start, n_rows)?.f_to_kind(wide(t.kind()))?;
            Ok(rows.f_view([run.n_docs, run.len, heads.n_heads, heads.head_dim])?.f_transpose(1, 2)?)
        };
        let (dq, dk, dv) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
            &as_bhte(do_)?,
            &q,
            &k,
            &v,
            &as_bhte(o)?,
            lse_bht,
            0.0,
            true,
            None::<&Tensor>,
            None,
        )?;
        let (dk, dv) = (rows(&ungroup(dk, 1, heads)?)?, rows(&ungroup(dv, 1, heads)?)?);
        join_into(&dqkv.f_narrow(0, run.start, n_rows)?, heads, &rows(&dq)?, &dk, &dv)?;
    }
    Ok(dqkv)
}

// ---- the plain form ----

/// [`forward`] by libtorch's common ops, a document at a time, in fp32 or wider: every dtype and device, and the judge of
/// the kernels.
pub fn plain_forward(qkv: &Tensor, heads: Heads, documents: &Documents) -> Result<Tensor> {
    let o = Tensor::f_empty([qkv.size()[0], heads.q_width()], (qkv.kind(), qkv.device()))?;
    for (start, len) in documents.each() {
        let Attended { p_htt, v_hte, .. } = attend(&qkv.f_narrow(0, start, len)?, heads)?;
        let o_te = p_htt.f_matmul(&v_hte)?.f_transpose(0, 1)?.f_reshape([len, heads.q_width()])?;
        o.f_narrow(0, start, len)?.f_copy_(&o_te)?;
    }
    Ok(o)
}

/// [`backward`] by libtorch's common ops, as [`plain_forward`]; the weights are made again.
///
/// With `P = softmax(s Q Kᵀ)`: `dV = Pᵀ dO`, `dS = P ⊙ (dO Vᵀ - rowsum(dO ⊙ O))`, `dQ = s dS K`, `dK = s dSᵀ Q`.
pub fn plain_backward(do_: &Tensor, qkv: &Tensor, o: &Tensor, heads: Heads, documents: &Documents) -> Result<Tensor> {
    let dqkv = qkv.f_empty_like()?;
    for (start, len) in documents.each() {
        let of_doc = |t: &Tensor| -> Result<Tensor> { Ok(t.f_narrow(0, start, len)?) };
        let Attended { q_hte, k_hte, v_hte, p_htt, scale } = attend(&of_doc(qkv)?, heads)?;
        let as_hte = |t: &Tensor| -> Result<Tensor> {
            let rows = of_doc(t)?.f_reshape([len, heads.n_heads, heads.head_dim])?;
            Ok(rows.f_transpose(0, 1)?.f_to_kind(p_htt.kind())?)
        };
        let (do_hte, o_hte) = (as_hte(do_)?, as_hte(o)?);
        let dv_hte = p_htt.f_transpose(1, 2)?.f_matmul(&do_hte)?;
        let dot_ht1 = do_hte.f_mul(&o_hte)?.f_sum_dim_intlist(-1i64, true, p_htt.kind())?;
        let dp_htt = do_hte.f_matmul(&v_hte.f_transpose(1, 2)?)?;
        let ds_htt = dp_htt.f_sub(&dot_ht1)?.f_mul(&p_htt)?.f_times(scale)?;
        let dq_hte = ds_htt.f_matmul(&k_hte)?;
        let dk_hte = ds_htt.f_transpose(1, 2)?.f_matmul(&q_hte)?;
        let as_the = |t: &Tensor| -> Result<Tensor> { Ok(t.f_transpose(0, 1)?) };
        let (dk, dv) = (ungroup(as_the(&dk_hte)?, 1, heads)?, ungroup(as_the(&dv_hte)?, 1, heads)?);
        join_into(&of_doc(&dqkv)?, heads, &as_the(&dq_hte)?, &dk, &dv)?;
    }
    Ok(dqkv)
}

/// One document's queries, keys and values and its attention weights, all for every query head and in fp32 or wider.
struct Attended {
    q_hte: Tensor,
    k_hte: Tensor,
    v_hte: Tensor,
    /// Row: query, column: key.
    p_htt: Tensor,
    /// Of the scores, `1 / sqrt(E)`.
    scale: f64,
}

fn attend(qkv: &Tensor, heads: Heads) -> Result<Attended> {
    let (len, kind) = (qkv.size()[0], wide(qkv.kind()));
    let Parts { q, k, v } = Parts::of(qkv, heads)?.repeated(heads)?;
    let as_hte = |t: &Tensor| -> Result<Tensor> { Ok(t.f_transpose(0, 1)?.f_to_kind(kind)?) };
    let (q_hte, k_hte, v_hte) = (as_hte(&q)?, as_hte(&k)?, as_hte(&v)?);
    let scale = 1.0 / (heads.head_dim as f64).sqrt();
    let scores_htt = q_hte.f_matmul(&k_hte.f_transpose(1, 2)?)?.f_times(scale)?;
    let later = Tensor::f_ones([len, len], (Kind::Bool, qkv.device()))?.f_triu(1)?;
    scores_htt.f_fill_where_(&later, f64::NEG_INFINITY)?;
    let p_htt = scores_htt.f_softmax(-1, kind)?;
    Ok(Attended { q_hte, k_hte, v_hte, p_htt, scale })
}

// ---- generation ----

/// Attends from one new token to all tokens before it and itself: `q [1, H E]`, cached keys and values `[T, K E]`.
pub fn one_token(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let n_tokens = k.size()[0];
    let (n_kv, group, e) = (heads.n_kv_heads, heads.n_heads / heads.n_kv_heads, heads.head_dim);
    // The scale's power of two goes first: it rounds nothing, and keeps the scores within fp16's range.
    let scale = 1.0 / (e as f64).sqrt();
    let power_of_two = scale.log2().floor().exp2();
    // Query heads of a group share their key head: one small product a key head.
    let q_kge = q.f_view([n_kv, group, e])?.f_times(power_of_two)?;
    let k_kte = k.f_view([n_tokens, n_kv, e])?.f_transpose(0, 1)?;
    let v_kte = v.f_view([n_tokens, n_kv, e])?.f_transpose(0, 1)?;
    let scores = q_kge.f_matmul(&k_kte.f_transpose(1, 2)?)?.f_to_kind(wide(q.kind()))?;
    let p_kgt = scores.f_times(scale / power_of_two)?.f_softmax(-1, wide(q.kind()))?.f_to_kind(q.kind())?;
    Ok(p_kgt.f_matmul(&v_kte)?.f_reshape([1, heads.q_width()])?)
}
