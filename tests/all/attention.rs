//! Attention over ragged documents: the CPU's kernel and the plain form against each other and against autograd, and
//! which kernel is chosen where.

use crate::support::target_of;
use bellora::ops::attention::{self, Documents, Heads, Kernel};
use bellora::ops::target::Target;
use tch::{Device, Kind, Tensor};

/// Lengths 1, 5, 5, 5 (one run), 24, 1, 63 and 2.
const BORDERS: [usize; 9] = [0, 1, 6, 11, 16, 40, 41, 104, 106];

/// As many key heads as query heads, groups, and one key head for all.
const LAYOUTS: [Heads; 3] = [
    Heads { n_heads: 4, n_kv_heads: 4, head_dim: 16 },
    Heads { n_heads: 6, n_kv_heads: 2, head_dim: 24 },
    Heads { n_heads: 3, n_kv_heads: 1, head_dim: 10 },
];

fn documents() -> Documents {
    Documents::new(BORDERS.to_vec(), Device::Cpu).unwrap()
}

fn draw(columns: i64, kind: Kind) -> Tensor {
    Tensor::randn([106, columns], (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// The largest difference as a share of the judge's largest element.
#[track_caller]
fn assert_near(name: &str, ours: &Tensor, judge: &Tensor, share: f64) {
    assert_eq!((ours.size(), ours.kind()), (judge.size(), judge.kind()), "{name}");
    let (ours, judge) = (ours.to_kind(Kind::Double), judge.to_kind(Kind::Double));
    let worst = ((&ours - &judge).abs().max() / judge.abs().max()).double_value(&[]);
    println!("{name}: largest difference {worst:.1e} of the largest element (bound {share:.0e})");
    assert!(worst <= share, "{name}: {worst:.3e} exceeds {share:.0e}");
}

#[test]
fn the_plain_form_is_autograd_s() {
    for heads in LAYOUTS {
        tch::manual_seed(1);
        let (qkv, do_) = (draw(heads.qkv_width(), Kind::Double), draw(heads.q_width(), Kind::Double));
        let leaf = qkv.copy().set_requires_grad(true);
        let o_judge = by_one_mask(&leaf, heads);
        let dqkv_judge = &Tensor::run_backward(&[(&o_judge * &do_).sum(Kind::Double)], &[&leaf], false, false)[0];
        tch::no_grad(|| {
            let o = attention::plain_forward(&qkv, heads, &documents()).unwrap();
            let dqkv = attention::plain_backward(&do_, &qkv, &o, heads, &documents()).unwrap();
            // fp64 on both sides: rounding alone, of sums of at most 63 products.
            assert_near(&format!("plain o {heads:?}"), &o, &o_judge.detach(), 1e-13);
            assert_near(&format!("plain dqkv {heads:?}"), &dqkv, dqkv_judge, 1e-13);
        });
    }
}

/// Attention of all rows at once, masked to earlier rows of the same document.
fn by_one_mask(qkv: &Tensor, heads: Heads) -> Tensor {
    let n = qkv.size()[0];
    let part = |start: i64, n_heads: i64| {
        let part = qkv.narrow(1, start, n_heads * heads.head_dim).view([n, n_heads, heads.head_dim]).transpose(0, 1);
        part.repeat_interleave_self_int(heads.n_heads / n_heads, 0, None)
    };
    let q = part(0, heads.n_heads);
    let (k, v) = (part(heads.q_width(), heads.n_kv_heads), part(heads.q_width() + heads.kv_width(), heads.n_kv_heads));
    let of_row: Vec<i64> = (0..n).map(|row| BORDERS.iter().filter(|b| **b as i64 <= row).count() as i64).collect();
    let of_row = Tensor::from_slice(&of_row);
    let same = of_row.unsqueeze(0).eq_tensor(&of_row.unsqueeze(1));
    let hidden = same.logical_and(&Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).tril(0)).logical_not();
    let scores = q.matmul(&k.transpose(1, 2)) / (heads.head_dim as f64).sqrt();
    let p = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, qkv.kind());
    p.matmul(&v).transpose(0, 1).reshape([n, heads.q_width()])
}

#[test]
fn the_cpu_kernel_equals_the_plain_form() {
    for (kind, share) in [
        (Kind::Double, 1e-13),
        // Sums of up to 63 products, each rounded to 6e-8.
        (Kind::Float, 2e-6),
        // The kernel rounds the weights and the result to 2^-9 each; the plain form the result alone.
        (Kind::BFloat16, 1.2e-2),
    ] {
        for heads in LAYOUTS {
            tch::manual_seed(2);
            let (qkv, do_) = (draw(heads.qkv_width(), kind), draw(heads.q_width(), kind));
            tch::no_grad(|| {
                let documents = documents();
                let (o, saved) = attention::forward(target_of(&qkv), &qkv, heads, &documents).unwrap();
                let o_plain = attention::plain_forward(&qkv, heads, &documents).unwrap();
                assert_near(&format!("o {kind:?} {heads:?}"), &o, &o_plain, share);
                let dqkv = attention::backward(&do_, &qkv, &o, heads, &documents, &saved).unwrap();
                let dqkv_plain = attention::plain_backward(&do_, &qkv, &o_plain, heads, &documents).unwrap();
                assert_near(&format!("dqkv {kind:?} {heads:?}"), &dqkv, &dqkv_plain, share);
            });
        }
    }
}

#[test]
fn one_token_attends_as_the_last_row_of_a_document() {
    for (kind, share) in [(Kind::Double, 1e-13), (Kind::Float, 2e-6), (Kind::BFloat16, 1.2e-2), (Kind::Half, 2e-3)] {
        for heads in LAYOUTS {
            tch::manual_seed(3);
            let qkv = draw(heads.qkv_width(), kind);
            let (q, kv) = (heads.q_width(), heads.kv_width());
            let one = Documents::new(vec![0, 106], Device::Cpu).unwrap();
            let judge = attention::plain_forward(&qkv, heads, &one).unwrap().narrow(0, 105, 1);
            let last = qkv.narrow(0, 105, 1).narrow(1, 0, q);
            let (k, v) = (qkv.narrow(1, q, kv).contiguous(), qkv.narrow(1, q + kv, kv).contiguous());
            let o = attention::one_token(&last, &k, &v, heads).unwrap();
            assert_near(&format!("one token {kind:?} {heads:?}"), &o, &judge, share);
        }
    }
}

#[test]
fn one_token_of_large_queries_and_keys_stays_within_fp16() {
    let heads = Heads { n_heads: 2, n_kv_heads: 1, head_dim: 24 };
    // All keys are alike, so the answer is the mean of the values. A bare score is 24 * 100 * 100, and fp16 ends at 65504.
    let filled = |rows: i64, columns: i64| Tensor::full([rows, columns], 100.0, (Kind::Half, Device::Cpu));
    let v = Tensor::arange(3 * 24, (Kind::Float, Device::Cpu)).view([3, 24]).to_kind(Kind::Half);
    let o = attention::one_token(&filled(1, 48), &filled(3, 24), &v, heads).unwrap();
    let mean = v.mean_dim(0i64, true, Kind::Float).repeat([1, 2]).to_kind(Kind::Half);
    // A third is rounded to 2^-12 in fp16, and so is the sum.
    assert_near("one token of large numbers", &o, &mean, 1e-3);
}

#[test]
fn each_device_dtype_and_width_has_its_kernel() {
    use Kernel::{Cpu, Efficient, Flash, Plain};
    let gpu = Device::Cuda(0);
    for (device, capability, kind, head_dim, kernel) in [
        (Device::Cpu, (0, 0), Kind::BFloat16, 128, Cpu),
        (Device::Cpu, (0, 0), Kind::Double, 10, Cpu),
        (gpu, (9, 0), Kind::BFloat16, 128, Flash),
        (gpu, (8, 6), Kind::Half, 64, Flash),
        (gpu, (12, 0), Kind::BFloat16, 256, Flash),
        (gpu, (9, 0), Kind::BFloat16, 264, Efficient),
        (gpu, (9, 0), Kind::Float, 128, Efficient),
        (gpu, (7, 0), Kind::Half, 128, Efficient),
        (gpu, (7, 5), Kind::Float, 64, Efficient),
        (gpu, (7, 5), Kind::BFloat16, 128, Plain),
        (gpu, (9, 0), Kind::BFloat16, 20, Plain),
        (gpu, (7, 0), Kind::Half, 12, Plain),
        (gpu, (9, 0), Kind::Double, 128, Plain),
    ] {
        let chosen = Kernel::choose(Target { device, kind, capability }, head_dim);
        assert_eq!(chosen, kernel, "{device:?} {capability:?} {kind:?} {head_dim}");
    }
}
