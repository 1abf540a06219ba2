//! Every op's explicit backward against libtorch's autograd of a plain formula.
//!
//! In fp64 the two differ by rounding alone: a few hundred additions of numbers near 1 leave less than 1e-12, so the
//! bound of 1e-10 fails on any wrong term. The bounds in narrower dtypes stand beside their tests.

use crate::support::target_of;
use bellora::ops::attention::{self, Documents, Heads};
use bellora::ops::cross_entropy::ScaledLoss;
use bellora::ops::dropout::{self, DropoutKey, RowOrigin};
use bellora::ops::rope::{self, RopeScaling, RopeTable};
use bellora::ops::{cross_entropy, embedding, gemm, rms_norm, swiglu};
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
const FP64_BOUND: f64 = 1e-10;

fn leaf(t: &Tensor) -> Tensor {
    t.detach().copy().set_requires_grad(true)
}

/// The gradients of `(y · dy).sum()` by autograd.
fn autograd(y: &Tensor, dy: &Tensor, xs: &[&Tensor]) -> Vec<Tensor> {
    Tensor::run_backward(&[(y * dy).sum(y.kind())], xs, false, false)
}

#[track_caller]
fn assert_close(name: &str, ours: &Tensor, judge: &Tensor, bound: f64) {
    assert_eq!(ours.size(), judge.size(), "{name}: shape");
    let difference = (ours.to_kind(Kind::Double) - judge.to_kind(Kind::Double)).abs();
    let (worst, index) = (difference.max().double_value(&[]), difference.argmax(None, false).int64_value(&[]));
    println!("{name}: largest difference {worst:.2e} at flat index {index} (bound {bound:.0e})");
    assert!(worst <= bound, "{name}: {worst:.3e} at flat index {index} exceeds {bound:.0e}");
}

/// Differences of at most a share of the judge's largest element.
#[track_caller]
fn assert_near(name: &str, ours: &Tensor, judge: &Tensor, share: f64) {
    assert_close(name, ours, judge, share * judge.abs().max().double_value(&[]));
}

fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    tch::no_grad(f)
}

#[test]
fn rms_norm_backward() {
    tch::manual_seed(1);
    let (x, w, dy) = (Tensor::randn([7, 48], F64), Tensor::rand([48], F64) + 0.5, Tensor::randn([7, 48], F64));
    let res = Tensor::randn([7, 48], F64);
    let xl = leaf(&x);
    let judge = &xl * (xl.square().mean_dim(-1, true, Kind::Double) + 1e-5).rsqrt() * &w;
    let dx_judge = &autograd(&judge, &dy, &[&xl])[0];
    no_grad(|| {
        let (y, saved) = rms_norm::forward(target_of(&x), &x, &w, 1e-5).unwrap();
        let (dx, again) = rms_norm::backward(target_of(&dy), &dy, &x, &w, &saved, &res).unwrap();
        assert_close("rms_norm y", &y, &judge, FP64_BOUND);
        assert_close("rms_norm y made again in backward", &again, &y, 0.0);
        assert_close("rms_norm y recomputed", &rms_norm::recompute(&x, &w, &saved).unwrap(), &y, 0.0);
        assert_close("rms_norm dx", &dx, &(dx_judge + &res), FP64_BOUND);
        let (mut sum, residual) = (&x - &res, res);
        let (y_of_sum, _) = rms_norm::forward_add_(target_of(&sum), &mut sum, &residual, &w, 1e-5).unwrap();
        assert_close("rms_norm y of a sum", &y_of_sum, &y, FP64_BOUND);
    });
}

#[test]
fn swiglu_backward() {
    tch::manual_seed(2);
    let (gu, dh) = (Tensor::randn([9, 64], F64), Tensor::randn([9, 32], F64));
    let l = leaf(&gu);
    let judge = l.narrow(1, 0, 32).silu() * l.narrow(1, 32, 32);
    let dgu_judge = &autograd(&judge, &dh, &[&l])[0];
    no_grad(|| {
        let h = swiglu::forward(target_of(&gu), &gu).unwrap();
        let (dgu, again) = swiglu::backward(target_of(&dh), &dh, &gu).unwrap();
        assert_close("swiglu h", &h, &judge, FP64_BOUND);
        assert_close("swiglu h made again in backward", &again, &h, 0.0);
        assert_close("swiglu d[g|u]", &dgu, dgu_judge, FP64_BOUND);
    });
}

/// RoPE by its definition: pairs `(i, i + E/2)` turned by `position · theta^(-2i/E)`.
fn plain_rope(x_nhe: &Tensor, positions: &[i64], theta: f64) -> Tensor {
    let e = x_nhe.size()[2];
    let inv_freq = (Tensor::arange(e / 2, F64) * (-2.0 / e as f64 * theta.ln())).exp().to_kind(Kind::Float);
    let angle = Tensor::from_slice(positions).to_kind(Kind::Double).outer(&inv_freq.to_kind(Kind::Double)).unsqueeze(1);
    let (a, b) = (x_nhe.narrow(2, 0, e / 2), x_nhe.narrow(2, e / 2, e / 2));
    Tensor::cat(&[&a * angle.cos() - &b * angle.sin(), &b * angle.cos() + &a * angle.sin()], 2)
}

#[test]
fn rope_backward() {
    tch::manual_seed(3);
    let positions = [0, 1, 2, 0, 1, 17];
    let (x, dy) = (Tensor::randn([6, 3, 8], F64), Tensor::randn([6, 3, 8], F64));
    let l = leaf(&x);
    let judge = plain_rope(&l, &positions, 10_000.0);
    let dx_judge = &autograd(&judge, &dy, &[&l])[0];
    no_grad(|| {
        let inv_freq = rope::inverse_frequencies(8, 10_000.0, RopeScaling::None);
        let table = RopeTable::new(&inv_freq, 32, Kind::Double, Device::Cpu).unwrap();
        let rotation = table.at(&Tensor::from_slice(&positions)).unwrap();
        let (y, dx) = (x.copy(), dy.copy());
        rope::forward_(target_of(&y), &y, &rotation).unwrap();
        rope::backward_(target_of(&dx), &dx, &rotation).unwrap();
        // The inverse frequencies are fp32 on both sides, computed differently: one unit in their last place times 17.
        assert_close("rope y", &y, &judge, 5e-6);
        assert_close("rope dx", &dx, dx_judge, 5e-6);
    });
}

/// Attention with an explicit mask over the packed row: causal and within documents.
fn plain_attention(qkv: &Tensor, heads: Heads, cu_seqlens: &[usize]) -> Tensor {
    let n = qkv.size()[0];
    let part = |start, n_heads| {
        qkv.narrow(1, start, n_heads * heads.head_dim).view([n, n_heads, heads.head_dim]).transpose(0, 1)
    };
    let group = heads.n_heads / heads.n_kv_heads;
    let q = part(0, heads.n_heads);
    let k = part(heads.q_width(), heads.n_kv_heads).repeat_interleave_self_int(group, 0, None);
    let v = part(heads.q_width() + heads.kv_width(), heads.n_kv_heads).repeat_interleave_self_int(group, 0, None);
    let mut document = Vec::new();
    for (i, bounds) in cu_seqlens.windows(2).enumerate() {
        document.extend(std::iter::repeat_n(i as i64, bounds[1] - bounds[0]));
    }
    let document = Tensor::from_slice(&document);
    let same = document.unsqueeze(0).eq_tensor(&document.unsqueeze(1));
    let allowed = same.logical_and(&Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).tril(0));
    let scores = q.matmul(&k.transpose(1, 2)) / (heads.head_dim as f64).sqrt();
    let p = scores.masked_fill(&allowed.logical_not(), f64::NEG_INFINITY).softmax(-1, qkv.kind());
    p.matmul(&v).transpose(0, 1).reshape([n, heads.q_width()])
}

#[test]
fn attention_backward_over_ragged_documents() {
    for (kind, bound) in [
        (Kind::Double, FP64_BOUND),
        // fp32: sums of up to 40 products of numbers near 1, each rounded to 6e-8.
        (Kind::Float, 2e-5),
    ] {
        for heads in [
            Heads { n_heads: 4, n_kv_heads: 4, head_dim: 16 },
            Heads { n_heads: 6, n_kv_heads: 2, head_dim: 24 },
            Heads { n_heads: 3, n_kv_heads: 1, head_dim: 8 },
        ] {
            tch::manual_seed(4);
            let cu_seqlens = [0, 1, 6, 11, 16, 40];
            let qkv = Tensor::randn([40, heads.qkv_width()], (kind, Device::Cpu));
            let do_ = Tensor::randn([40, heads.q_width()], (kind, Device::Cpu));
            let l = leaf(&qkv);
            let judge = plain_attention(&l, heads, &cu_seqlens);
            let dqkv_judge = &autograd(&judge, &do_, &[&l])[0];
            no_grad(|| {
                let documents = Documents::new(cu_seqlens.to_vec(), Device::Cpu).unwrap();
                let (o, saved) = attention::forward(target_of(&qkv), &qkv, heads, &documents).unwrap();
                let dqkv = attention::backward(&do_, &qkv, &o, heads, &documents, &saved).unwrap();
                assert_close(&format!("attention o {kind:?} {heads:?}"), &o, &judge, bound);
                assert_close(&format!("attention dqkv {kind:?} {heads:?}"), &dqkv, dqkv_judge, bound);
            });
        }
    }
}

#[test]
fn cross_entropy_backward() {
    tch::manual_seed(5);
    let logits = Tensor::randn([11, 37], F64) * 3;
    let targets = Tensor::randint(37, [11], (Kind::Int64, Device::Cpu));
    let weights = Tensor::rand([11], F64);
    let l = leaf(&logits);
    let judge = (-l.log_softmax(-1, Kind::Double).gather(1, &targets.unsqueeze(1), false).squeeze_dim(1) * &weights)
        .sum(Kind::Double);
    let d_judge = &autograd(&judge, &Tensor::from(128.0), &[&l])[0];
    no_grad(|| {
        let loss = ScaledLoss::new(128.0, Device::Cpu).unwrap();
        let dlogits =
            cross_entropy::forward_backward(target_of(&logits), logits.copy(), 37, &targets, &weights, &loss).unwrap();
        assert_close("cross_entropy loss", &loss.value().unwrap(), &judge, FP64_BOUND);
        assert_close("cross_entropy dlogits", &dlogits, d_judge, FP64_BOUND);
        let nll = cross_entropy::nll(&logits, &targets).unwrap();
        assert_close("cross_entropy nll", &(nll * weights).sum(Kind::Double), &judge, FP64_BOUND);
    });
}

#[test]
fn embedding_backward_adds_repeated_ids() {
    tch::manual_seed(6);
    let (table, dx) = (Tensor::randn([10, 4], F64), Tensor::randn([6, 4], F64));
    let ids = Tensor::from_slice(&[3i64, 9, 3, 0, 3, 9]);
    let l = leaf(&table);
    let judge = l.index_select(0, &ids);
    let d_judge = &autograd(&judge, &dx, &[&l])[0];
    no_grad(|| {
        assert_close("embedding x", &embedding::forward(&table, &ids).unwrap(), &judge, 0.0);
        let dtable = Tensor::zeros([10, 4], F64);
        embedding::backward_(&dtable, &ids, &dx).unwrap();
        assert_close("embedding dtable", &dtable, d_judge, FP64_BOUND);
    });
}

/// The CPU's row kernels against the same op by libtorch's: rows that are no multiple of a vector, one row, many rows.
///
/// Bounds are shares of the largest element. fp32: a few dozen roundings (6e-8 each) and the exponential's two units in
/// the last place. bf16: the plain ops round intermediate results too, up to three times, 2^-9 each, and once ours.
#[test]
fn row_kernels_equal_the_plain_ops() {
    for (kind, share) in [(Kind::Float, 3e-6), (Kind::BFloat16, 8e-3)] {
        for (n, d) in [(1i64, 2i64), (5, 46), (300, 514)] {
            tch::manual_seed(7);
            let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (x, w, dy, res) = (draw(&[n, d]), draw(&[d]), draw(&[n, d]), draw(&[n, d]));
            let name = |op: &str| format!("{op} {kind:?} [{n}, {d}]");
            no_grad(|| {
                let (y, saved) = rms_norm::forward(target_of(&x), &x, &w, 1e-5).unwrap();
                let (y_plain, saved_plain) = rms_norm::plain_forward(&x, &w, 1e-5).unwrap();
                assert_near(&name("rms_norm y"), &y, &y_plain, share);
                assert_near(&name("rms_norm rstd"), &saved.rstd_n1, &saved_plain.rstd_n1, 1e-6);
                let (dx, again) = rms_norm::backward(target_of(&dy), &dy, &x, &w, &saved, &res).unwrap();
                let (dx_plain, _) = rms_norm::plain_backward(&dy, &x, &w, &saved_plain, &res).unwrap();
                assert_near(&name("rms_norm dx"), &dx, &dx_plain, share);
                assert_close(&name("rms_norm y again"), &again, &y, 0.0);
                let (mut sum, mut sum_plain) = (x.copy(), x.copy());
                let (y, _) = rms_norm::forward_add_(target_of(&sum), &mut sum, &res, &w, 1e-5).unwrap();
                let _ = sum_plain.g_add_(&res);
                assert_close(&name("rms_norm sum"), &sum, &sum_plain, 0.0);
                let (y_plain, _) = rms_norm::plain_forward(&sum_plain, &w, 1e-5).unwrap();
                assert_near(&name("rms_norm y of a sum"), &y, &y_plain, share);

                let (gu, dh) = (draw(&[n, 2 * d]) * 3, draw(&[n, d]));
                let h = swiglu::forward(target_of(&gu), &gu).unwrap();
                assert_near(&name("swiglu h"), &h, &swiglu::plain_forward(&gu).unwrap(), share);
                let (dgu, again) = swiglu::backward(target_of(&dh), &dh, &gu).unwrap();
                let (dgu_plain, _) = swiglu::plain_backward(&dh, &gu).unwrap();
                assert_near(&name("swiglu d[g|u]"), &dgu, &dgu_plain, share);
                assert_close(&name("swiglu h again"), &again, &h, 0.0);

                // Rotated where the heads lie: the first columns of a wider row.
                let inv_freq = rope::inverse_frequencies(d, 10_000.0, RopeScaling::None);
                let table = RopeTable::new(&inv_freq, n, kind, Device::Cpu).unwrap();
                let rotation = table.at(&Tensor::arange(n, (Kind::Int64, Device::Cpu))).unwrap();
                let wide = draw(&[n, 3 * d]);
                for sign in [1.0, -1.0] {
                    let (ours, plain) = (wide.copy(), wide.copy());
                    let heads = |t: &Tensor| t.narrow(1, 0, 2 * d).view([n, 2, d]);
                    match sign > 0.0 {
                        true => rope::forward_(target_of(&heads(&ours)), &heads(&ours), &rotation).unwrap(),
                        false => rope::backward_(target_of(&heads(&ours)), &heads(&ours), &rotation).unwrap(),
                    }
                    rope::plain_rotate_(&heads(&plain), &rotation, sign).unwrap();
                    assert_near(&name("rope"), &ours, &plain, share);
                }

                let logits = draw(&[n, d]) * 4;
                let targets = Tensor::randint(d, [n], (Kind::Int64, Device::Cpu));
                let weights = Tensor::rand([n], (Kind::Float, Device::Cpu));
                // The last columns are the padding of a head: they come out as zero and count for nothing.
                let padded = Tensor::cat(&[&logits, &draw(&[n, 7])], 1);
                let [loss, loss_plain] = [(); 2].map(|()| ScaledLoss::new(8.0, Device::Cpu).unwrap());
                let ours =
                    cross_entropy::forward_backward(target_of(&padded), padded.copy(), d, &targets, &weights, &loss)
                        .unwrap();
                let plain = cross_entropy::plain_forward_backward(&padded, d, &targets, &weights, &loss_plain).unwrap();
                let (dlogits, dlogits_plain) = (ours.narrow(1, 0, d), plain.narrow(1, 0, d));
                for beyond in [&ours, &plain].map(|dlogits| dlogits.narrow(1, d, 7)) {
                    assert_close(&name("cross_entropy padding"), &beyond, &beyond.zeros_like(), 0.0);
                }
                let [loss, loss_plain] = [loss, loss_plain].map(|loss| loss.value().unwrap().double_value(&[]));
                // The loss is computed in fp32 from the same logits on both sides, whatever their dtype.
                assert!((loss / loss_plain - 1.0).abs() < 1e-5, "{loss} {loss_plain}");
                // A softmax near 1 less 1 keeps the absolute error of its parts: of a weight up to 1 times the scale.
                assert_close(&name("cross_entropy dlogits"), &dlogits, &dlogits_plain, 8.0 * share);
            });
        }
    }
}

#[test]
fn cross_entropy_of_extreme_logits_is_finite_where_it_should_be() {
    let logits = Tensor::from_slice(&[1e4f32, -1e4, 0.0, -3e38, 3e38, 0.0]).view([2, 3]);
    let targets = Tensor::from_slice(&[0i64, 1]);
    let weights = Tensor::from_slice(&[1.0f32, 1.0]);
    let loss = ScaledLoss::new(1.0, Device::Cpu).unwrap();
    let dlogits = cross_entropy::forward_backward(target_of(&logits), logits, 3, &targets, &weights, &loss).unwrap();
    assert_eq!(loss.value().unwrap().double_value(&[]), 0.0);
    assert_close("dlogits", &dlogits, &Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)), 1e-30);
    let nan = Tensor::from_slice(&[f32::NAN, 1.0]).view([1, 2]);
    let one = Tensor::from_slice(&[1.0f32]);
    let dlogits =
        cross_entropy::forward_backward(target_of(&nan), nan, 2, &Tensor::from_slice(&[1i64]), &one, &loss).unwrap();
    let loss = loss.value().unwrap().double_value(&[]);
    assert!(!loss.is_finite() || !dlogits.sum(Kind::Float).double_value(&[]).is_finite(), "a NaN must not vanish");
}

/// Philox 4x32 with ten rounds, by its definition (Salmon et al., SC 2011).
fn philox(mut c: [u32; 4], seed: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let (low, high) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(high >> 32) as u32 ^ c[1] ^ k0, high as u32, (low >> 32) as u32 ^ c[3] ^ k1, low as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

#[test]
fn philox_judge_matches_its_known_answers() {
    // The generator's authors publish these (Random123, kat_vectors).
    assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
}

#[test]
fn dropout_masks_are_the_documented_function() {
    let key = DropoutKey { p: 0.3, seed: 0x1234_5678_9abc_def0, step: 41 };
    let drop_below = (0.3f64 * 65536.0).round() as u32;
    let kept = 65536.0 / f64::from(65536 - drop_below);
    let (slots, tokens) = ([0i64, 5, 5, 63], [0i64, 0, 1, 511]);
    let (channels, site) = (203u32, 6u32);
    let mut judge = Vec::new();
    for (slot, token) in slots.iter().zip(&tokens) {
        for channel in 0..channels {
            let word = philox([(channel / 8) | (site << 16), *token as u32, *slot as u32, key.step], key.seed)
                [(channel % 8 / 2) as usize];
            let draw = if channel % 2 == 0 { word & 0xffff } else { word >> 16 };
            judge.push(if draw < drop_below { 0.0 } else { kept });
        }
    }
    let judge = Tensor::from_slice(&judge).view([4, i64::from(channels)]);
    let origin = RowOrigin { slot_n: Tensor::from_slice(&slots), token_n: Tensor::from_slice(&tokens) };
    let ones = Tensor::ones([4, i64::from(channels)], (Kind::Float, Device::Cpu));
    let mask = dropout::apply(target_of(&ones), &ones, key, site, &origin).unwrap();
    assert_close("dropout mask", &mask, &judge, 1e-6);
    // A view with a row stride gives the same.
    let wide = Tensor::ones([4, i64::from(channels) + 9], (Kind::Float, Device::Cpu));
    let strided = dropout::apply(
        target_of(&wide.narrow(1, 0, i64::from(channels))),
        &wide.narrow(1, 0, i64::from(channels)),
        key,
        site,
        &origin,
    )
    .unwrap();
    assert_close("dropout mask of a strided view", &strided, &judge, 1e-6);
}

#[test]
fn dropout_keeps_the_mean() {
    let n = 512;
    let rows: Vec<i64> = (0..n).collect();
    let origin =
        RowOrigin { slot_n: Tensor::zeros([n], (Kind::Int64, Device::Cpu)), token_n: Tensor::from_slice(&rows) };
    let ones = Tensor::ones([n, 1024], (Kind::Float, Device::Cpu));
    let mask = dropout::apply(target_of(&ones), &ones, DropoutKey { p: 0.05, seed: 7, step: 0 }, 0, &origin).unwrap();
    // 524,288 draws: the share of zeros has a standard deviation of 3e-4, five of them are allowed.
    let dropped = mask.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    assert!((dropped - 0.05).abs() < 1.5e-3, "{dropped}");
}

#[test]
fn a_product_goes_into_its_columns_alone() {
    tch::manual_seed(8);
    for (kind, bound) in [(Kind::Double, 1e-12), (Kind::Float, 1e-4), (Kind::BFloat16, 0.2), (Kind::Half, 0.03)] {
        let (dy, w) = (Tensor::randn([7, 50], F64).to_kind(kind), Tensor::randn([50, 29], F64).to_kind(kind));
        let wide = Tensor::full([7, 40], f64::NAN, (kind, Device::Cpu));
        gemm::nn_into_(target_of(&wide.narrow(1, 6, 29)), &wide.narrow(1, 6, 29), &dy, &w).unwrap();
        let judge = dy.to_kind(Kind::Double).matmul(&w.to_kind(Kind::Double));
        assert_close("dy w", &wide.narrow(1, 6, 29).to_kind(Kind::Double), &judge, bound);
        // What lies beside the columns is as it was.
        assert_eq!(wide.isnan().sum(Kind::Int64).int64_value(&[]), 7 * 11, "{kind:?}");
    }
}
