//! What moves memory, and attention.

use tch::{Kind, Tensor};

use super::{Pieces, Work};
use crate::error::Result;
use crate::ops::attention::{self, Documents};
use crate::ops::dropout::{self, DropoutKey, RowOrigin};
use crate::ops::rope::{self, RopeScaling, RopeTable};
use crate::ops::{rms_norm, swiglu};
use crate::torch::number::{filled, range};

const DROPOUT: DropoutKey = DropoutKey { p: 0.05, seed: 1, step: 1 };
const EPS: f64 = 1e-5;
const ROPE_THETA: f64 = 10_000.0;

/// Times the engine's own forms of everything that is no product, a plain copy beside them, and libtorch's fused norm.
pub(super) fn time(pieces: &mut Pieces) -> Result<()> {
    let target = pieces.sizes.target;
    let (n, d, f, heads) = (pieces.sizes.rows, pieces.sizes.hidden, pieces.sizes.intermediate, pieces.sizes.heads);
    let rows = |pieces: &Pieces, columns: i64| Work::Bytes(pieces.element() * n as f64 * columns as f64);

    pieces.time("copy", rows(pieces, 2 * d), |pieces| {
        let (from, to) = (pieces.draw(&[n, d])?, pieces.draw(&[n, d])?);
        Ok(Box::new(move || Ok(to.shallow_clone().f_copy_(&from)?)))
    })?;
    pieces.time("dropout", rows(pieces, 2 * d), |pieces| {
        let x = pieces.draw(&[n, d])?;
        let origin = RowOrigin {
            slot_n: filled(&[n], 0i64, (Kind::Int64, target.device))?,
            token_n: range(0, n, (Kind::Int64, target.device))?,
        };
        Ok(Box::new(move || dropout::apply(target, &x, DROPOUT, 0, &origin).map(drop)))
    })?;
    pieces.time("norm", rows(pieces, 2 * d), |pieces| {
        let (x, w) = (pieces.draw(&[n, d])?, pieces.draw(&[d])?);
        Ok(Box::new(move || rms_norm::forward(target, &x, &w, EPS).map(drop)))
    })?;
    // Reads dy, x and what is added to the gradient; writes dx and y again.
    pieces.time("norm backward", rows(pieces, 5 * d), |pieces| {
        let (dy, x, w) = (pieces.draw(&[n, d])?, pieces.draw(&[n, d])?, pieces.draw(&[d])?);
        let (_, saved) = rms_norm::forward(target, &x, &w, EPS)?;
        Ok(Box::new(move || rms_norm::backward(target, &dy, &x, &w, &saved, &dy).map(drop)))
    })?;
    pieces.time("norm fused", rows(pieces, 2 * d), |pieces| {
        let (x, w) = (pieces.draw(&[n, d])?, pieces.draw(&[d])?);
        Ok(Box::new(move || {
            let _ = x.f_internal_fused_rms_norm([d], Some(&w), EPS)?;
            Ok(())
        }))
    })?;
    let turned = heads.q_width() + heads.kv_width();
    pieces.time("rope", rows(pieces, 2 * turned), |pieces| {
        let qkv = pieces.draw(&[n, heads.qkv_width()])?;
        let inv_freq = rope::inverse_frequencies(heads.head_dim, ROPE_THETA, RopeScaling::None);
        let positions = range(0, n, (Kind::Int64, target.device))?;
        let rotation = RopeTable::new(&inv_freq, n, target.kind, target.device)?.at(&positions)?;
        Ok(Box::new(move || rope::forward_(target, &heads.rotated(&qkv)?, &rotation)))
    })?;
    pieces.time("swiglu", rows(pieces, 3 * f), |pieces| {
        let gu = pieces.draw(&[n, 2 * f])?;
        Ok(Box::new(move || swiglu::forward(target, &gu).map(drop)))
    })?;
    // Reads dh and [g | u]; writes their gradient and h again.
    pieces.time("swiglu backward", rows(pieces, 6 * f), |pieces| {
        let (dh, gu) = (pieces.draw(&[n, f])?, pieces.draw(&[n, 2 * f])?);
        Ok(Box::new(move || swiglu::backward(target, &dh, &gu).map(drop)))
    })?;
    attention(pieces)
}

/// Attention over the documents: two products forward and five backward, over the pairs that a causal mask allows.
fn attention(pieces: &mut Pieces) -> Result<()> {
    let (target, n, heads) = (pieces.sizes.target, pieces.sizes.rows, pieces.sizes.heads);
    let borders = pieces.sizes.borders.clone();
    let pairs: f64 = borders.windows(2).map(|ends| (ends[1] - ends[0]) as f64).map(|len| len * (len + 1.0) / 2.0).sum();
    let forward = 4.0 * pairs * heads.q_width() as f64;
    let operands = |pieces: &Pieces| -> Result<(Tensor, Documents)> {
        Ok((pieces.draw(&[n, heads.qkv_width()])?, Documents::new(borders.clone(), target.device)?))
    };
    pieces.time("attention", Work::Flops(forward), |pieces| {
        let (qkv, documents) = operands(pieces)?;
        Ok(Box::new(move || attention::forward(target, &qkv, heads, &documents).map(drop)))
    })?;
    pieces.time("attention backward", Work::Flops(2.5 * forward), |pieces| {
        let (qkv, documents) = operands(pieces)?;
        let (o, saved) = attention::forward(target, &qkv, heads, &documents)?;
        let d_o = pieces.draw(&o.size())?;
        Ok(Box::new(move || attention::backward(&d_o, &qkv, &o, heads, &documents, &saved).map(drop)))
    })
}
