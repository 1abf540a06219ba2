//! Keys and values of the tokens a text has so far, so that the next token costs one row.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::ops::attention::Heads;

/// One block's keys and values: room for `max_tokens` rows `[K E]` each.
#[derive(Debug)]
pub struct LayerCache {
    k: Tensor,
    v: Tensor,
    len: i64,
}

impl LayerCache {
    /// Tokens held.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether no token is held yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the keys and values of new rows of a fused projection.
    pub fn append(&mut self, qkv: &Tensor, heads: Heads) -> Result<()> {
        let n = qkv.size()[0];
        if self.len + n > self.k.size()[0] {
            return Err(Error::failed("generation", format!("the cache has room for {} tokens", self.k.size()[0])));
        }
        let (q, kv) = (heads.q_width(), heads.kv_width());
        self.k.f_narrow(0, self.len, n)?.f_copy_(&qkv.f_narrow(1, q, kv)?)?;
        self.v.f_narrow(0, self.len, n)?.f_copy_(&qkv.f_narrow(1, q + kv, kv)?)?;
        self.len += n;
        Ok(())
    }

    /// The keys and values held, `[T, K E]` each.
    pub fn keys_values(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.f_narrow(0, 0, self.len)?, self.v.f_narrow(0, 0, self.len)?))
    }
}

/// The caches of all blocks.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl KvCache {
    /// Room for `max_tokens` tokens.
    pub fn new(n_layers: usize, max_tokens: i64, heads: Heads, kind: Kind, device: Device) -> Result<Self> {
        let room = || Tensor::f_empty([max_tokens, heads.kv_width()], (kind, device));
        let layers = (0..n_layers).map(|_| Ok(LayerCache { k: room()?, v: room()?, len: 0 })).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Tokens held.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether no token is held yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The blocks' caches in order.
    pub fn layers_mut(&mut self) -> impl Iterator<Item = &mut LayerCache> {
        self.layers.iter_mut()
    }
}
