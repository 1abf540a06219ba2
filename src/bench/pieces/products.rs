//! The products of one block, with adapters on all seven projections.

use tch::{Kind, Tensor};

use super::{Call, Pieces, Work};
use crate::error::Result;
use crate::ops::gemm;
use crate::torch::number::filled;

/// A map of a block: the projections that share an input.
struct Map {
    name: &'static str,
    /// Columns of the input.
    input: i64,
    /// The projections by name, and the columns of each.
    outputs: Vec<(&'static str, i64)>,
}

impl Map {
    /// Columns of all projections.
    fn output(&self) -> i64 {
        self.outputs.iter().map(|(_, width)| width).sum()
    }

    /// Columns of the stacked `x Aᵀ`.
    fn ranks(&self, r: i64) -> i64 {
        r * self.outputs.len() as i64
    }
}

fn maps(pieces: &Pieces) -> [Map; 4] {
    let (d, f, heads) = (pieces.sizes.hidden, pieces.sizes.intermediate, pieces.sizes.heads);
    let (q, kv) = (heads.q_width(), heads.kv_width());
    let map = |name, input, outputs: &[(&'static str, i64)]| Map { name, input, outputs: outputs.to_vec() };
    [
        map("qkv", d, &[("q", q), ("k", kv), ("v", kv)]),
        map("o", q, &[("o", d)]),
        map("gate_up", d, &[("gate", f), ("up", f)]),
        map("down", f, &[("down", d)]),
    ]
}

fn flops(n: i64, o: i64, i: i64) -> Work {
    Work::Flops(2.0 * n as f64 * o as f64 * i as f64)
}

/// Times what the library of products that is preferred now makes: the maps' products with frozen weights, forward and backward;
/// those with the adapters' A and B; the adapters' gradients in fp32; a frozen weight with B beside it, `[W | B]`.
pub(super) fn time(pieces: &mut Pieces) -> Result<()> {
    let (target, n, r) = (pieces.sizes.target, pieces.sizes.rows, pieces.sizes.r);
    let maps = maps(pieces);
    for map in &maps {
        let (o, i) = (map.output(), map.input);
        by_weight(pieces, &format!("frozen {}", map.name), o, i)?;
        pieces.time(&format!("frozen {} backward", map.name), flops(n, o, i), |pieces| {
            let (dy, w) = (pieces.draw(&[n, o])?, pieces.draw(&[o, i])?);
            Ok(Box::new(move || gemm::nn(target, &dy, &w).map(drop)))
        })?;
    }
    for map in &maps {
        by_weight(pieces, &format!("adapter A {}", map.name), map.ranks(r), map.input)?;
    }
    for map in &maps {
        let mut start = 0;
        for (at, (name, width)) in (0..).zip(&map.outputs) {
            let (first, width) = (start, *width);
            start += width;
            pieces.time(&format!("adapter B {name}"), flops(n, width, r), |pieces| {
                // Into the projection's own columns of the map's result.
                let (whole, xa) = (pieces.draw(&[n, map.output()])?, pieces.draw(&[n, map.ranks(r)])?);
                let b = pieces.draw(&[width, r])?;
                let (y, x) = (whole.f_narrow(1, first, width)?, xa.f_narrow(1, at * r, r)?);
                Ok(Box::new(move || gemm::add_nt_(target, &y, &x, &b)))
            })?;
        }
    }
    for map in &maps {
        gradient(pieces, &format!("fp32 A {}", map.name), map.ranks(r), map.input)?;
        let (name, width) = map.outputs[0];
        gradient(pieces, &format!("fp32 B {name}"), width, r)?;
    }
    for map in &maps {
        by_weight(pieces, &format!("joined {}", map.name), map.output(), map.input + map.ranks(r))?;
    }
    Ok(())
}

/// `[N, I]` times `[O, I]` transposed, as a map multiplies by its weight.
fn by_weight(pieces: &mut Pieces, name: &str, o: i64, i: i64) -> Result<()> {
    let (target, n) = (pieces.sizes.target, pieces.sizes.rows);
    pieces.time(name, flops(n, o, i), |pieces| {
        let (x, w) = (pieces.draw(&[n, i])?, pieces.draw(&[o, i])?);
        Ok(Box::new(move || gemm::nt(target, &x, &w).map(drop)))
    })
}

/// `[N, O]` transposed times `[N, I]`, onto fp32 sums.
fn gradient(pieces: &mut Pieces, name: &str, o: i64, i: i64) -> Result<()> {
    let (target, n) = (pieces.sizes.target, pieces.sizes.rows);
    pieces.time(name, flops(n, o, i), |pieces| {
        let (dy, x) = (pieces.draw(&[n, o])?, pieces.draw(&[n, i])?);
        let sums = Tensor::f_zeros([o, i], (Kind::Float, target.device))?;
        Ok(Box::new(move || gemm::accumulate_tn_(target, &sums, &dy, &x)))
    })
}

/// Times the frozen products by `_scaled_mm`, operands rounded to fp8 beforehand.
pub(super) fn time_fp8(pieces: &mut Pieces) -> Result<()> {
    let (target, n) = (pieces.sizes.target, pieces.sizes.rows);
    for map in maps(pieces) {
        let (o, i) = (map.output(), map.input);
        pieces.time(&format!("fp8 {}", map.name), flops(n, o, i), |pieces| {
            let fp8 = |t: Tensor| t.f_to_kind(Kind::Float8e4m3fn);
            let (x, w) = (fp8(pieces.draw(&[n, i])?)?, fp8(pieces.draw(&[o, i])?)?);
            let one = filled(&[], 1.0, (Kind::Float, target.device))?;
            let call: Call = Box::new(move || {
                let none = None::<&Tensor>;
                let _ = x.f_internal_scaled_mm(&w.f_tr()?, &one, &one, none, none, target.kind, false)?;
                Ok(())
            });
            Ok(call)
        })?;
    }
    Ok(())
}
