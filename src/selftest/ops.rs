//! Every op of a training step, forward and backward, against its plain form in fp64 on the CPU.
//!
//! Legend of axes: `N` rows, `I` inputs, `O` outputs, `D` hidden, `F` feed-forward, `H` heads, `K` KV heads, `E` head width,
//! `V` vocabulary, `P` parameters or padded vocabulary.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::attention::{self, Documents, Heads};
use crate::ops::cross_entropy::{self, ScaledLoss};
use crate::ops::dropout::{self, DropoutKey, RowOrigin};
use crate::ops::rope::{self, RopeScaling, RopeTable};
use crate::ops::{embedding, gemm, rms_norm, swiglu};
use crate::selftest::judge::{Bench, FP64, Row, Twin, tolerance};
use crate::torch::number::{WithNumber, filled, range};
use crate::torch::{self, AdamWStep};

/// Tries an op in one dtype on one device.
type Trial = fn(&mut Bench) -> Result<()>;

/// The ops by name.
const TRIALS: [(&str, Trial); 8] = [
    ("gemm", gemm_trial),
    ("embedding", embedding_trial),
    ("rms_norm", rms_norm_trial),
    ("rope", rope_trial),
    ("attention", attention_trial),
    ("swiglu", swiglu_trial),
    ("dropout", dropout_trial),
    ("cross_entropy", cross_entropy_trial),
];

/// Those that work in fp32 whatever the dtype of the model.
const FP32_TRIALS: [(&str, Trial); 2] = [("grad_norm", grad_norm_trial), ("adamw", adamw_trial)];

/// Tries all ops in one dtype on one device. An op that cannot run is a row that is not in order, and the others go on.
/// `tell` hears the rows of an op once it is done.
pub(super) fn try_all(kind: Kind, device: Device, tell: &dyn Fn(&Row)) -> Vec<Row> {
    let mut rows = Vec::new();
    let fp32_trials = if kind == Kind::Float { &FP32_TRIALS[..] } else { &[] };
    for (op, trial) in TRIALS.iter().chain(fp32_trials) {
        let mut bench = Bench::new(kind, device);
        let result = trial(&mut bench);
        let mut found = bench.into_rows();
        if let Err(error) = result {
            found.push(Row::without_result(op, kind, error.to_string()));
        }
        found.iter().for_each(tell);
        rows.extend(found);
    }
    rows
}

/// Products in all their forms; sizes that fill the tiles of the kernels, sizes that do not, and one row, for which libraries
/// have kernels of their own.
fn gemm_trial(bench: &mut Bench) -> Result<()> {
    for [n, i, o] in [[96, 192, 136], [7, 50, 29], [1, 192, 136]] {
        let (x_ni, w_oi, dy_no) = (bench.normal(&[n, i])?, bench.normal(&[o, i])?, bench.normal(&[n, o])?);
        let nt = x_ni.judge.f_mm(&w_oi.judge.f_tr()?)?;
        let nn = dy_no.judge.f_mm(&w_oi.judge)?;
        let bound = |n_roundings, n_terms| tolerance(bench.kind, n_roundings, n_terms);
        let (nt_bound, nn_bound) = (bound(1, i), bound(1, o));
        // A product that is made apart is rounded before it is added, and the sum is rounded again.
        let (add_nt_bound, add_nn_bound) = (bound(2, i + 1), bound(2, o + 1));
        // Gradients are fp32. The CPU has no product with an fp32 result from half-precision operands: it rounds first.
        let rounds_first = bench.device == Device::Cpu && bench.kind != Kind::Float;
        let tn_bound = bound(u32::from(rounds_first), n + 1);

        bench.hold("gemm x wᵀ", &gemm::nt(bench.target, &x_ni.ours, &w_oi.ours)?, &nt, nt_bound)?;
        bench.hold("gemm dy w", &gemm::nn(bench.target, &dy_no.ours, &w_oi.ours)?, &nn, nn_bound)?;

        // Over some columns of wider rows that hold anything, as the adapters' gradients go side by side.
        let beside = filled(&[n, i + 16], f64::NAN, (bench.kind, bench.device))?;
        let columns = beside.f_narrow(1, 8, i)?;
        gemm::nn_into_(bench.target, &columns, &dy_no.ours, &w_oi.ours)?;
        bench.hold("gemm = dy w", &columns, &nn, nn_bound)?;

        // Into some columns of wider rows, as the adapters add theirs.
        let wide = bench.normal(&[n, o + 16])?;
        gemm::add_nt_(bench.target, &wide.ours.f_narrow(1, 8, o)?, &x_ni.ours, &w_oi.ours)?;
        let _ = wide.judge.f_narrow(1, 8, o)?.f_add_(&nt)?;
        bench.hold("gemm += x wᵀ", &wide.ours, &wide.judge, add_nt_bound)?;
        let dx = bench.normal(&[n, i])?;
        gemm::add_nn_(bench.target, &dx.ours, &dy_no.ours, &w_oi.ours)?;
        bench.hold("gemm += dy w", &dx.ours, &(dx.judge.f_add(&nn)?), add_nn_bound)?;

        let grad_oi = bench.twin_in(&Tensor::f_randn([o, i], FP64)?, Kind::Float)?;
        gemm::accumulate_tn_(bench.target, &grad_oi.ours, &dy_no.ours, &x_ni.ours)?;
        let grad_judge = grad_oi.judge.f_add(&dy_no.judge.f_tr()?.f_mm(&x_ni.judge)?)?;
        bench.hold("gemm fp32 += dyᵀ x", &grad_oi.ours, &grad_judge, tn_bound)?;
    }
    Ok(())
}

fn embedding_trial(bench: &mut Bench) -> Result<()> {
    let (n_rows, n_ids, d) = (50, 120, 72);
    let (table, dx) = (bench.normal(&[n_rows, d])?, bench.normal(&[n_ids, d])?);
    // Squares: some ids occur often, some never.
    let ids = range(0, n_ids, (Kind::Int64, Device::Cpu))?.f_square()?.f_modulo(n_rows)?;
    let ids_there = bench.put(&ids)?;
    let x = embedding::forward(&table.ours, &ids_there)?;
    bench.hold("embedding x", &x, &table.judge.f_index_select(0, &ids)?, 0.0)?;
    let grad = bench.twin_in(&Tensor::f_zeros([n_rows, d], FP64)?, Kind::Float)?;
    embedding::backward_(&grad.ours, &ids_there, &dx.ours)?;
    let judge = grad.judge.f_index_add(0, &ids, &dx.judge)?;
    let bound = tolerance(Kind::Float, 0, n_ids);
    bench.hold("embedding dtable", &grad.ours, &judge, bound)
}

fn rms_norm_trial(bench: &mut Bench) -> Result<()> {
    const EPS: f64 = 1e-5;
    for [n, d] in [[37, 200], [5, 520]] {
        let (x, w, dy) = (bench.normal(&[n, d])?, bench.normal(&[d])?, bench.normal(&[n, d])?);
        let residual = bench.normal(&[n, d])?;
        // One rounding, of the result; statistics and products are fp32.
        let once = tolerance(bench.kind, 1, d);
        let (y_judge, saved_judge) = rms_norm::plain_forward(&x.judge, &w.judge, EPS)?;
        let (y, saved) = rms_norm::forward(bench.target, &x.ours, &w.ours, EPS)?;
        bench.hold("rms_norm y", &y, &y_judge, once)?;
        let (dx, again) = rms_norm::backward(bench.target, &dy.ours, &x.ours, &w.ours, &saved, &residual.ours)?;
        let (dx_judge, _) = rms_norm::plain_backward(&dy.judge, &x.judge, &w.judge, &saved_judge, &residual.judge)?;
        bench.hold("rms_norm dx", &dx, &dx_judge, once)?;
        bench.hold("rms_norm y again", &again, &y_judge, once)?;

        // The sum is rounded to the dtype, and its norm reads that.
        let twice = tolerance(bench.kind, 2, d);
        let mut sum = x.ours.f_detach_copy()?;
        let (y, _) = rms_norm::forward_add_(bench.target, &mut sum, &residual.ours, &w.ours, EPS)?;
        let sum_judge = x.judge.f_add(&residual.judge)?;
        bench.hold("rms_norm x + residual", &sum, &sum_judge, once)?;
        let (y_judge, _) = rms_norm::plain_forward(&sum_judge, &w.judge, EPS)?;
        bench.hold("rms_norm y of the sum", &y, &y_judge, twice)?;
    }
    Ok(())
}

fn rope_trial(bench: &mut Bench) -> Result<()> {
    let heads = Heads { n_heads: 6, n_kv_heads: 2, head_dim: 32 };
    let (n, n_positions) = (90, 300);
    let positions = range(0, n, (Kind::Int64, Device::Cpu))?.f_times(7)?.f_modulo(n_positions)?;
    let inv_freq = rope::inverse_frequencies(heads.head_dim, 10_000.0, RopeScaling::None);
    let there = RopeTable::new(&inv_freq, n_positions, bench.kind, bench.device)?.at(&bench.put(&positions)?)?;
    let judging = RopeTable::new(&inv_freq, n_positions, Kind::Double, Device::Cpu)?.at(&positions)?;
    // An angle of up to as many radians as there are positions is rounded to fp32, and the result to the dtype.
    let bound = tolerance(bench.kind, 1, n_positions);
    for (op, sign) in [("rope", 1.0), ("rope back", -1.0)] {
        // Turned where they lie, in the first columns of the fused rows.
        let qkv = bench.normal(&[n, heads.qkv_width()])?;
        let turned = heads.rotated(&qkv.ours)?;
        if sign > 0.0 {
            rope::forward_(bench.target, &turned, &there)?
        } else {
            rope::backward_(bench.target, &turned, &there)?
        }
        rope::plain_rotate_(&heads.rotated(&qkv.judge)?, &judging, sign)?;
        bench.hold(op, &qkv.ours, &qkv.judge, bound)?;
    }
    Ok(())
}

/// Documents of one token, of equal and of unequal lengths, shorter and longer than a kernel's blocks of 64 or 128 keys.
const RAGGED: [usize; 9] = [0, 1, 8, 15, 145, 147, 211, 275, 310];

fn attention_trial(bench: &mut Bench) -> Result<()> {
    let n = RAGGED[RAGGED.len() - 1] as i64;
    let there = Documents::new(RAGGED.to_vec(), bench.device)?;
    let judging = Documents::new(RAGGED.to_vec(), Device::Cpu)?;
    // Forward rounds the probabilities and the result; besides, exponentials of fp32 sums of E products.
    let o_bound = tolerance(bench.kind, 2, 256);
    // Backward rounds probabilities, their gradients, the o that it reads and the result.
    let dqkv_bound = tolerance(bench.kind, 4, 512);
    for (name, heads) in [
        ("attention", Heads { n_heads: 4, n_kv_heads: 4, head_dim: 64 }),
        ("attention grouped", Heads { n_heads: 6, n_kv_heads: 2, head_dim: 128 }),
    ] {
        let (qkv, do_) = (bench.normal(&[n, heads.qkv_width()])?, bench.normal(&[n, heads.q_width()])?);
        let o_judge = attention::plain_forward(&qkv.judge, heads, &judging)?;
        let (o, saved) = attention::forward(bench.target, &qkv.ours, heads, &there)?;
        bench.hold(&format!("{name} o"), &o, &o_judge, o_bound)?;
        let dqkv = attention::backward(&do_.ours, &qkv.ours, &o, heads, &there, &saved)?;
        let dqkv_judge = attention::plain_backward(&do_.judge, &qkv.judge, &o_judge, heads, &judging)?;
        // Each by itself: where one of them is small, the others would hide it.
        let (q, kv) = (heads.q_width(), heads.kv_width());
        for (part, start, width) in [("dq", 0, q), ("dk", q, kv), ("dv", q + kv, kv)] {
            let (ours, judge) = (dqkv.f_narrow(1, start, width)?, dqkv_judge.f_narrow(1, start, width)?);
            bench.hold(&format!("{name} {part}"), &ours, &judge, dqkv_bound)?;
        }

        let Twin { ours, judge } = &qkv;
        let part = |t: &Tensor, start: i64, width: i64| t.f_narrow(1, start, width);
        let one = |t: &Tensor| -> Result<Tensor> {
            let q = part(&t.f_narrow(0, n - 1, 1)?, 0, heads.q_width())?.f_contiguous()?;
            let k = part(t, heads.q_width(), heads.kv_width())?.f_contiguous()?;
            let v = part(t, heads.q_width() + heads.kv_width(), heads.kv_width())?.f_contiguous()?;
            attention::one_token(&q, &k, &v, heads)
        };
        // Here the scores are rounded too, which are a few units: that becomes the relative error of a probability.
        let bound = tolerance(bench.kind, 4, 256);
        bench.hold(&format!("{name} of one token"), &one(ours)?, &one(judge)?, bound)?;
    }
    Ok(())
}

fn swiglu_trial(bench: &mut Bench) -> Result<()> {
    let (n, f) = (41, 168);
    let gu = bench.twin(&Tensor::f_randn([n, 2 * f], FP64)?.f_times(3.0)?)?;
    let dh = bench.normal(&[n, f])?;
    // The plain form rounds silu(g) and then the product, in backward dh ⊙ u and what it is multiplied by (up to 1.1).
    let bound = tolerance(bench.kind, 3, 8);
    let h_judge = swiglu::plain_forward(&gu.judge)?;
    bench.hold("swiglu h", &swiglu::forward(bench.target, &gu.ours)?, &h_judge, bound)?;
    let (dgu, again) = swiglu::backward(bench.target, &dh.ours, &gu.ours)?;
    bench.hold("swiglu d[g|u]", &dgu, &swiglu::plain_backward(&dh.judge, &gu.judge)?.0, bound)?;
    bench.hold("swiglu h again", &again, &h_judge, bound)
}

/// Philox 4x32-10 by its definition (Salmon et al., SC 2011).
fn philox(mut counter: [u32; 4], seed: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let (low, high) = (u64::from(counter[0]) * 0xD251_1F53, u64::from(counter[2]) * 0xCD9E_8D57);
        counter =
            [(high >> 32) as u32 ^ counter[1] ^ k0, high as u32, (low >> 32) as u32 ^ counter[3] ^ k1, low as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    counter
}

/// The mask is a function of numbers alone, so its bits are the same on every device: none may differ.
fn dropout_trial(bench: &mut Bench) -> Result<()> {
    const DROP_BELOW: u32 = 3277; // 0.05 in steps of 2^-16
    let key = DropoutKey { p: 0.05, seed: 0x1234_5678_9ABC_DEF0, step: 41 };
    let (site, channels) = (6u32, 203u32);
    let slots: Vec<i64> = (0..40).map(|row| row / 7 * 9).collect();
    let tokens: Vec<i64> = (0..40).map(|row| row % 7 + 500 * (row / 30)).collect();
    let mut kept = Vec::new();
    for (slot, token) in slots.iter().zip(&tokens) {
        for channel in 0..channels {
            let counter = [(channel / 8) | (site << 16), *token as u32, *slot as u32, key.step];
            let word = philox(counter, key.seed)[(channel % 8 / 2) as usize];
            let draw = if channel % 2 == 0 { word & 0xffff } else { word >> 16 };
            kept.push(f64::from(u8::from(draw >= DROP_BELOW)));
        }
    }
    let kept = Tensor::f_from_slice(&kept)?.f_view([slots.len() as i64, i64::from(channels)])?;
    let origin = RowOrigin {
        slot_n: bench.put(&Tensor::f_from_slice(&slots)?)?,
        token_n: bench.put(&Tensor::f_from_slice(&tokens)?)?,
    };
    let ones = bench.twin(&Tensor::f_ones(kept.size(), FP64)?)?;
    let mask = dropout::apply(bench.target, &ones.ours, key, site, &origin)?.f_is(0.0)?.f_logical_not()?;
    bench.hold("dropout mask", &mask, &kept, 0.0)?;
    let x = bench.normal(&kept.size())?;
    let scale = 65_536.0 / f64::from(65_536 - DROP_BELOW);
    let judge = x.judge.f_mul(&kept)?.f_times(scale)?;
    // One rounding of the result; where the scale is rounded to the dtype first, another.
    let bound = tolerance(bench.kind, 2, 1);
    bench.hold("dropout x", &dropout::apply(bench.target, &x.ours, key, site, &origin)?, &judge, bound)
}

fn cross_entropy_trial(bench: &mut Bench) -> Result<()> {
    // The head's table is padded to a multiple of 64 rows.
    let (n, vocab_size, padded, scale) = (33, 997, 1024, 128.0);
    let logits = bench.twin(&Tensor::f_randn([n, padded], FP64)?.f_times(4.0)?)?;
    let targets = range(0, n, (Kind::Int64, Device::Cpu))?.f_times(31)?.f_modulo(vocab_size)?;
    let weights = bench.twin_in(&Tensor::f_rand([n], FP64)?.f_over(n as f64)?, Kind::Float)?;
    let targets_there = bench.put(&targets)?;
    // The loss is computed in fp32 from the same logits, whatever their dtype: V exponentials are added up.
    let fp32 = tolerance(Kind::Float, 0, vocab_size);
    let nll_judge = cross_entropy::nll(&logits.judge.f_narrow(1, 0, vocab_size)?, &targets)?;
    let nll = cross_entropy::nll(&logits.ours.f_narrow(1, 0, vocab_size)?, &targets_there)?;
    bench.hold("cross_entropy nll", &nll, &nll_judge, fp32)?;

    let (loss, loss_judge) = (ScaledLoss::new(scale, bench.device)?, ScaledLoss::new(scale, Device::Cpu)?);
    let dlogits =
        cross_entropy::forward_backward(bench.target, logits.ours, vocab_size, &targets_there, &weights.ours, &loss)?;
    let dlogits_judge =
        cross_entropy::plain_forward_backward(&logits.judge, vocab_size, &targets, &weights.judge, &loss_judge)?;
    bench.hold("cross_entropy loss", &loss.value()?, &loss_judge.value()?, fp32)?;
    let bound = tolerance(bench.kind, 1, vocab_size);
    bench.hold("cross_entropy dlogits", &dlogits, &dlogits_judge, bound)?;
    // What lies beyond the vocabulary must not reach the head's gradient.
    let beyond = dlogits.f_narrow(1, vocab_size, padded - vocab_size)?;
    bench.hold("cross_entropy padding", &beyond, &Tensor::f_zeros(beyond.size(), FP64)?, 0.0)
}

/// The squares of the gradients are summed in fp64.
fn grad_norm_trial(bench: &mut Bench) -> Result<()> {
    let grads = bench.twin_in(&Tensor::f_randn([70_001], FP64)?.f_times(1e3)?, Kind::Float)?;
    let judge = grads.judge.f_square()?.f_sum(Kind::Double)?;
    // Some 70,000 additions of 2^-53 each.
    bench.hold("grad_norm²", &torch::sum_of_squares(&grads.ours)?, &judge, 1e-11)
}

/// Three updates, the second of which is skipped, against AdamW's formula in fp64.
fn adamw_trial(bench: &mut Bench) -> Result<()> {
    const BETAS: [f64; 2] = [0.9, 0.999];
    const LR: f64 = 3e-3;
    const EPS: f64 = 1e-8;
    const DECAY: f64 = 0.1;
    let n = 70_001;
    let param = bench.twin_in(&Tensor::f_randn([n], FP64)?, Kind::Float)?;
    let zeros = Tensor::f_zeros([n], FP64)?;
    let (exp_avg, exp_avg_sq) = (bench.twin_in(&zeros, Kind::Float)?, bench.twin_in(&zeros, Kind::Float)?);
    let (mut p, mut m, mut v) = (param.judge, exp_avg.judge, exp_avg_sq.judge);
    let scalar = |value: f64, kind: Kind| filled(&[], value, (kind, bench.device));
    let lr = scalar(LR, if bench.device == Device::Cpu { Kind::Double } else { Kind::Float })?;
    let mut n_updates = 0;
    for (divisor, skip) in [(1.0, false), (4.0, true), (1024.0, false)] {
        let grad = bench.twin_in(&Tensor::f_randn([n], FP64)?, Kind::Float)?;
        let numbers = AdamWStep {
            lr: &lr,
            update: &scalar(f64::from(n_updates + 1), Kind::Float)?,
            grad_divisor: &scalar(divisor, Kind::Float)?,
            skip: &scalar(f64::from(u8::from(skip)), Kind::Float)?,
            betas: BETAS,
            eps: EPS,
            weight_decay: DECAY,
        };
        torch::fused_adamw_(&param.ours, &grad.ours, &exp_avg.ours, &exp_avg_sq.ours, numbers)?;
        if skip {
            continue;
        }
        n_updates += 1;
        let g = grad.judge.f_over(divisor)?;
        p = p.f_times(1.0 - LR * DECAY)?;
        m = m.f_times(BETAS[0])?.f_add(&g.f_times(1.0 - BETAS[0])?)?;
        v = v.f_times(BETAS[1])?.f_add(&g.f_square()?.f_times(1.0 - BETAS[1])?)?;
        let corrected = |moment: &Tensor, beta: f64| moment.f_over(1.0 - beta.powi(n_updates));
        let step = corrected(&m, BETAS[0])?.f_div(&corrected(&v, BETAS[1])?.f_sqrt()?.f_plus(EPS)?)?;
        p = p.f_sub(&step.f_times(LR)?)?;
    }
    // Some roundings to fp32 an update. On the CPU 1 - beta, the bias corrections and the rate are fp64. libtorch's CUDA kernel
    // (ATen/native/cuda/fused_adam_utils.cuh) has the betas as fp32, which for 0.999 changes 1 - beta by 3 in 100,000.
    let bound = tolerance(Kind::Float, 16, 0);
    let of_beta = BETAS.map(|beta| if bench.device.is_cuda() { 2f64.powi(-25) / (1.0 - beta) } else { 0.0 });
    bench.hold("adamw parameters", &param.ours, &p, bound + of_beta[0] + of_beta[1])?;
    bench.hold("adamw exp_avg", &exp_avg.ours, &m, bound + of_beta[0])?;
    bench.hold("adamw exp_avg_sq", &exp_avg_sq.ours, &v, bound + of_beta[1])
}
