//! Causal self-attention within the documents of a packed micro-batch.
//!
//! Queries, keys and values stay where the fused projection put them: `qkv [N, (H + 2K) E]`.

use tch::{Kind, Tensor};

use crate::error::Result;

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

/// A run of adjoining documents of equal length: they are one call of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: i64,
    n_docs: i64,
    len: i64,
}

fn runs(cu_seqlens: &[usize]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for bounds in cu_seqlens.windows(2) {
        let len = (bounds[1] - bounds[0]) as i64;
        match runs.last_mut() {
            Some(run) if run.len == len => run.n_docs += 1,
            _ => runs.push(Run { start: bounds[0] as i64, n_docs: 1, len }),
        }
    }
    runs
}

/// What backward needs besides `qkv` and `o`: the log-sum-exp of every query, one tensor a run of documents.
#[derive(Debug)]
pub struct AttentionSaved {
    lse: Vec<Tensor>,
}

/// One run's queries, keys and values, `[B, H, T, E]`; keys and values repeated for their group of query heads.
struct RunView {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

fn view(qkv: &Tensor, heads: Heads, run: Run) -> Result<RunView> {
    let rows = qkv.f_narrow(0, run.start, run.n_docs * run.len)?;
    let part = |start: i64, n: i64| -> Result<Tensor> {
        let columns = rows.f_narrow(1, start, n * heads.head_dim)?;
        Ok(columns.f_view([run.n_docs, run.len, n, heads.head_dim])?.f_transpose(1, 2)?)
    };
    let group = heads.n_heads / heads.n_kv_heads;
    let repeated = |t: Tensor| -> Result<Tensor> {
        if group == 1 { Ok(t) } else { Ok(t.f_repeat_interleave_self_int(group, 1, None)?) }
    };
    Ok(RunView {
        q: part(0, heads.n_heads)?,
        k: repeated(part(heads.q_width(), heads.n_kv_heads)?)?,
        v: repeated(part(heads.q_width() + heads.kv_width(), heads.n_kv_heads)?)?,
    })
}

/// `[B, H, T, E]` to rows `[B T, H E]`.
fn rows(x_bhte: &Tensor) -> Result<Tensor> {
    let size = x_bhte.size();
    Ok(x_bhte.f_transpose(1, 2)?.f_reshape([size[0] * size[2], size[1] * size[3]])?)
}

/// Attends within each document; `cu_seqlens` are the documents' borders in rows. Returns `o [N, H E]`.
pub fn forward(qkv: &Tensor, heads: Heads, cu_seqlens: &[usize]) -> Result<(Tensor, AttentionSaved)> {
    let o = Tensor::f_empty([qkv.size()[0], heads.q_width()], (qkv.kind(), qkv.device()))?;
    let mut lse = Vec::new();
    for run in runs(cu_seqlens) {
        let RunView { q, k, v } = view(qkv, heads, run)?;
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
    Ok((o, AttentionSaved { lse }))
}

/// Attends from one new token to all tokens before it and itself: `q [1, H E]`, cached keys and values `[T, K E]`.
pub fn one_token(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let n_tokens = k.size()[0];
    let (n_kv, group, e) = (heads.n_kv_heads, heads.n_heads / heads.n_kv_heads, heads.head_dim);
    // Query heads of a group share their key head: one small product a key head.
    let q_kge = q.f_view([n_kv, group, e])?;
    let k_kte = k.f_view([n_tokens, n_kv, e])?.f_transpose(0, 1)?;
    let v_kte = v.f_view([n_tokens, n_kv, e])?.f_transpose(0, 1)?;
    let scores = q_kge.f_matmul(&k_kte.f_transpose(1, 2)?)?.f_to_kind(Kind::Float)?;
    let p_kgt = scores.f_mul_scalar(1.0 / (e as f64).sqrt())?.f_softmax(-1, Kind::Float)?.f_to_kind(q.kind())?;
    Ok(p_kgt.f_matmul(&v_kte)?.f_reshape([1, heads.q_width()])?)
}

/// Computes the gradient of `qkv` from that of `o`.
pub fn backward(
    do_: &Tensor,
    qkv: &Tensor,
    o: &Tensor,
    heads: Heads,
    cu_seqlens: &[usize],
    saved: &AttentionSaved,
) -> Result<Tensor> {
    let dqkv = qkv.f_empty_like()?;
    for (run, lse_bht) in runs(cu_seqlens).into_iter().zip(&saved.lse) {
        let n_rows = run.n_docs * run.len;
        let RunView { q, k, v } = view(qkv, heads, run)?;
        let as_bhte = |t: &Tensor| -> Result<Tensor> {
            let rows = t.f_narrow(0, run.start, n_rows)?;
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
        let out = dqkv.f_narrow(0, run.start, n_rows)?;
        out.f_narrow(1, 0, heads.q_width())?.f_copy_(&rows(&dq)?)?;
        out.f_narrow(1, heads.q_width(), heads.kv_width())?.f_copy_(&rows(&ungroup(dk, heads)?)?)?;
        out.f_narrow(1, heads.q_width() + heads.kv_width(), heads.kv_width())?.f_copy_(&rows(&ungroup(dv, heads)?)?)?;
    }
    Ok(dqkv)
}

/// Sums the gradients of repeated key or value heads over their group, in fp32: `[B, H, T, E] -> [B, K, T, E]`.
fn ungroup(dk_bhte: Tensor, heads: Heads) -> Result<Tensor> {
    if heads.n_heads == heads.n_kv_heads {
        return Ok(dk_bhte);
    }
    let size = dk_bhte.size();
    let group = heads.n_heads / heads.n_kv_heads;
    let wide = if dk_bhte.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(dk_bhte
        .f_reshape([size[0], heads.n_kv_heads, group, size[2], size[3]])?
        .f_sum_dim_intlist(2i64, false, wide)?
        .f_to_kind(dk_bhte.kind())?)
}
