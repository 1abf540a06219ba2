//! One transformer block: attention and MLP, each behind an RMSNorm, each added to the residual stream.

use tch::Tensor;

use crate::batch::Batch;
use crate::error::Result;
use crate::model::adapted_linear::AdaptedLinear;
use crate::model::head_norms::{HeadNorms, HeadNormsSaved};
use crate::model::kv_cache::LayerCache;
use crate::model::params::Gradients;
use crate::ops::attention::{self, AttentionSaved, Documents, Heads};
use crate::ops::dropout;
use crate::ops::rms_norm::{self, RmsNormSaved};
use crate::ops::rope::Rotation;
use crate::ops::target::Target;
use crate::ops::{rope, swiglu};

/// The four inputs that adapters read, numbered within a block for the dropout key.
#[derive(Debug, Clone, Copy)]
enum Site {
    Attention,
    Output,
    Mlp,
    Down,
}

/// A block's frozen weights and adapters.
#[derive(Debug)]
pub struct Block {
    /// Position in the model, from 0.
    pub layer: usize,
    /// What its operations are for.
    pub target: Target,
    /// Head layout.
    pub heads: Heads,
    /// Epsilon of both norms.
    pub rms_norm_eps: f64,
    /// `input_layernorm`.
    pub input_norm_d: Tensor,
    /// `q_proj`, `k_proj`, `v_proj` as one map.
    pub qkv: AdaptedLinear,
    /// `q_norm` and `k_norm`, where the model has them.
    pub head_norms: Option<HeadNorms>,
    /// `o_proj`.
    pub o: AdaptedLinear,
    /// `post_attention_layernorm`.
    pub mlp_norm_d: Tensor,
    /// `gate_proj`, `up_proj` as one map.
    pub gate_up: AdaptedLinear,
    /// `down_proj`.
    pub down: AdaptedLinear,
}

/// What a block keeps for backward. Normed inputs and the MLP's product are cheap and made again instead.
#[derive(Debug)]
pub struct BlockSaved {
    x_nd: Tensor,
    input_norm: RmsNormSaved,
    qkv_xa: Option<Tensor>,
    head_norms: Option<HeadNormsSaved>,
    /// After the norms of the heads and RoPE.
    qkv: Tensor,
    attention: AttentionSaved,
    o: Tensor,
    o_xa: Option<Tensor>,
    x2_nd: Tensor,
    mlp_norm: RmsNormSaved,
    gate_up_xa: Option<Tensor>,
    gu_n2f: Tensor,
    down_xa: Option<Tensor>,
}

impl Block {
    /// Runs the block over packed documents: `x [N, D] -> [N, D]`.
    pub fn forward(&self, x_nd: Tensor, batch: &Batch) -> Result<(Tensor, BlockSaved)> {
        let (h_nd, input_norm) = rms_norm::forward(self.target, &x_nd, &self.input_norm_d, self.rms_norm_eps)?;
        let (qkv, qkv_xa) = self.linear(&self.qkv, &h_nd, Site::Attention, batch)?;
        drop(h_nd);
        let head_norms = self.norm_heads_(&qkv)?;
        rope::forward_(self.target, &self.heads.rotated(&qkv)?, &batch.rotation)?;
        let (o, attention) = attention::forward(self.target, &qkv, self.heads, &batch.documents)?;
        let (mut x2_nd, o_xa) = self.linear(&self.o, &o, Site::Output, batch)?;

        let (h_nd, mlp_norm) =
            rms_norm::forward_add_(self.target, &mut x2_nd, &x_nd, &self.mlp_norm_d, self.rms_norm_eps)?;
        let (gu_n2f, gate_up_xa) = self.linear(&self.gate_up, &h_nd, Site::Mlp, batch)?;
        drop(h_nd);
        let h_nf = swiglu::forward(self.target, &gu_n2f)?;
        let (mut out_nd, down_xa) = self.linear(&self.down, &h_nf, Site::Down, batch)?;
        let _ = out_nd.f_add_(&x2_nd)?;

        let saved = BlockSaved {
            x_nd,
            input_norm,
            qkv_xa,
            head_norms,
            qkv,
            attention,
            o,
            o_xa,
            x2_nd,
            mlp_norm,
            gate_up_xa,
            gu_n2f,
            down_xa,
        };
        Ok((out_nd, saved))
    }

    /// Runs the block over new tokens of one text whose earlier keys and values are cached: all of a prompt at first,
    /// then one token at a time.
    pub fn decode(&self, x_nd: &Tensor, rotation: &Rotation, cache: &mut LayerCache) -> Result<Tensor> {
        let (h_nd, _) = rms_norm::forward(self.target, x_nd, &self.input_norm_d, self.rms_norm_eps)?;
        let (qkv, _) = self.qkv.forward(&h_nd, &h_nd)?;
        self.norm_heads_(&qkv)?;
        rope::forward_(self.target, &self.heads.rotated(&qkv)?, rotation)?;
        cache.append(&qkv, self.heads)?;
        let n = qkv.size()[0];
        let o = if cache.len() == n {
            attention::forward(self.target, &qkv, self.heads, &Documents::new(vec![0, n as usize], qkv.device())?)?.0
        } else {
            let (k, v) = cache.keys_values()?;
            attention::one_token(&qkv.f_narrow(1, 0, self.heads.q_width())?, &k, &v, self.heads)?
        };
        let (mut x2_nd, _) = self.o.forward(&o, &o)?;
        let (h_nd, _) = rms_norm::forward_add_(self.target, &mut x2_nd, x_nd, &self.mlp_norm_d, self.rms_norm_eps)?;
        let (gu_n2f, _) = self.gate_up.forward(&h_nd, &h_nd)?;
        let h_nf = swiglu::forward(self.target, &gu_n2f)?;
        let (mut out_nd, _) = self.down.forward(&h_nf, &h_nf)?;
        let _ = out_nd.f_add_(&x2_nd)?;
        Ok(out_nd)
    }

    /// Computes the gradient of the block's input from that of its output and accumulates the adapters' gradients.
    ///
    /// `None` comes back when nothing below this block is trained (`need_dx` is false): then the frozen product
    /// beneath the attention is not computed.
    pub fn backward(
        &self,
        saved: BlockSaved,
        dout_nd: Tensor,
        batch: &Batch,
        grads: &Gradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let ds = self.down.backward_b(&dout_nd, saved.down_xa.as_ref(), grads)?;
        let mut dh_nf = self.down.backward_input(&dout_nd)?;
        self.add_adapters(&self.down, &mut dh_nf, ds.as_ref(), Site::Down, batch)?;
        let (dgu_n2f, h_nf) = swiglu::backward(self.target, &dh_nf, &saved.gu_n2f)?;
        drop((dh_nf, saved.gu_n2f));
        self.accumulate_a(&self.down, ds, h_nf, Site::Down, batch, grads)?;

        let ds = self.gate_up.backward_b(&dgu_n2f, saved.gate_up_xa.as_ref(), grads)?;
        let mut dh_nd = self.gate_up.backward_input(&dgu_n2f)?;
        drop(dgu_n2f);
        self.add_adapters(&self.gate_up, &mut dh_nd, ds.as_ref(), Site::Mlp, batch)?;
        let (dx2_nd, h_nd) =
            rms_norm::backward(self.target, &dh_nd, &saved.x2_nd, &self.mlp_norm_d, &saved.mlp_norm, &dout_nd)?;
        drop((dh_nd, dout_nd, saved.x2_nd));
        self.accumulate_a(&self.gate_up, ds, h_nd, Site::Mlp, batch, grads)?;

        let ds = self.o.backward_b(&dx2_nd, saved.o_xa.as_ref(), grads)?;
        let mut do_ = self.o.backward_input(&dx2_nd)?;
        self.add_adapters(&self.o, &mut do_, ds.as_ref(), Site::Output, batch)?;
        self.accumulate_a(&self.o, ds, saved.o.shallow_clone(), Site::Output, batch, grads)?;
        let dqkv = attention::backward(&do_, &saved.qkv, &saved.o, self.heads, &batch.documents, &saved.attention)?;
        drop((do_, saved.qkv, saved.o));
        rope::backward_(self.target, &self.heads.rotated(&dqkv)?, &batch.rotation)?;
        if let Some((norms, saved)) = self.head_norms.as_ref().zip(saved.head_norms) {
            norms.backward_(self.target, &dqkv, self.heads, &saved)?;
        }

        let ds = self.qkv.backward_b(&dqkv, saved.qkv_xa.as_ref(), grads)?;
        if !need_dx {
            let h_nd = rms_norm::recompute(&saved.x_nd, &self.input_norm_d, &saved.input_norm)?;
            self.accumulate_a(&self.qkv, ds, h_nd, Site::Attention, batch, grads)?;
            return Ok(None);
        }
        let mut dh_nd = self.qkv.backward_input(&dqkv)?;
        drop(dqkv);
        self.add_adapters(&self.qkv, &mut dh_nd, ds.as_ref(), Site::Attention, batch)?;
        let (dx_nd, h_nd) =
            rms_norm::backward(self.target, &dh_nd, &saved.x_nd, &self.input_norm_d, &saved.input_norm, &dx2_nd)?;
        self.accumulate_a(&self.qkv, ds, h_nd, Site::Attention, batch, grads)?;
        Ok(Some(dx_nd))
    }

    /// Norms the heads of queries and keys, where the model does.
    fn norm_heads_(&self, qkv: &Tensor) -> Result<Option<HeadNormsSaved>> {
        self.head_norms.as_ref().map(|norms| norms.forward_(self.target, qkv, self.heads)).transpose()
    }

    fn site(&self, site: Site) -> u32 {
        self.layer as u32 * 4 + site as u32
    }

    /// The input as the adapters see it.
    fn dropped(&self, x: &Tensor, site: Site, batch: &Batch) -> Result<Tensor> {
        match batch.dropout {
            None => Ok(x.shallow_clone()),
            Some(key) => dropout::apply(self.target, x, key, self.site(site), &batch.origin),
        }
    }

    fn linear(&self, map: &AdaptedLinear, x: &Tensor, site: Site, batch: &Batch) -> Result<(Tensor, Option<Tensor>)> {
        if map.is_adapted() { map.forward(x, &self.dropped(x, site, batch)?) } else { map.forward(x, x) }
    }

    fn add_adapters(
        &self,
        map: &AdaptedLinear,
        dx: &mut Tensor,
        ds: Option<&Tensor>,
        site: Site,
        batch: &Batch,
    ) -> Result<()> {
        let drop = |t: &Tensor| self.dropped(t, site, batch);
        map.add_backward_adapters(dx, ds, batch.dropout.is_some().then_some(&drop))
    }

    fn accumulate_a(
        &self,
        map: &AdaptedLinear,
        ds: Option<Tensor>,
        x: Tensor,
        site: Site,
        batch: &Batch,
        grads: &Gradients,
    ) -> Result<()> {
        if ds.is_none() {
            return Ok(());
        }
        map.backward_a(ds.as_ref(), &self.dropped(&x, site, batch)?, grads)
    }
}
