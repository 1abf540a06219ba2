//! The room of libtorch: the operations that tch does not wrap, reached through a small C++ shim.
//!
//! Everything here is a safe function over tensors; `unsafe` stays inside.
#![expect(unsafe_code, reason = "the FFI room")]

pub mod cuda;
pub mod driver;
pub mod dtype;
pub mod host_memory;
pub mod memory;
pub mod number;
pub mod signal_mask;
pub mod timer;
pub mod trace;
pub mod transfer;

use std::ffi::{CStr, c_char, c_int};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use self::number::filled;
use crate::error::{Error, Result};

unsafe extern "C" {
    fn bellora_last_error() -> *const c_char;
    fn bellora_keep_freed_memory();
    fn bellora_addmm(out: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor, beta: f64, alpha: f64) -> c_int;
    fn bellora_onednn_linear(x: *mut C_tensor, w: *mut C_tensor, out: *mut *mut C_tensor) -> c_int;
    fn bellora_fused_adamw(
        param: *mut C_tensor,
        grad: *mut C_tensor,
        exp_avg: *mut C_tensor,
        exp_avg_sq: *mut C_tensor,
        step: *mut C_tensor,
        lr: *mut C_tensor,
        grad_divisor: *mut C_tensor,
        skip: *mut C_tensor,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    fn bellora_rms_norm(
        x: *mut C_tensor,
        add: *mut C_tensor,
        weight: *mut C_tensor,
        eps: f64,
        y: *mut *mut C_tensor,
        rstd: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_rms_norm_backward(
        dy: *mut C_tensor,
        x: *mut C_tensor,
        weight: *mut C_tensor,
        rstd: *mut C_tensor,
        dresidual: *mut C_tensor,
        dx: *mut *mut C_tensor,
        y: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_swiglu(gu: *mut C_tensor, h: *mut *mut C_tensor) -> c_int;
    fn bellora_swiglu_backward(
        dh: *mut C_tensor,
        gu: *mut C_tensor,
        dgu: *mut *mut C_tensor,
        h: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_rope(x: *mut C_tensor, cos: *mut C_tensor, sin: *mut C_tensor, sign: f64) -> c_int;
    fn bellora_cross_entropy(
        logits: *mut C_tensor,
        vocab_size: i64,
        targets: *mut C_tensor,
        weights: *mut C_tensor,
        loss: *mut f64,
    ) -> c_int;
    fn bellora_sum_of_squares(x: *mut C_tensor, out: *mut f64) -> c_int;
    fn bellora_dropout(
        x: *mut C_tensor,
        slot: *mut C_tensor,
        token: *mut C_tensor,
        seed: u64,
        step: u32,
        site: u32,
        drop_below: u32,
        out: *mut *mut C_tensor,
    ) -> c_int;
}

impl From<tch::TchError> for Error {
    /// Keeps the first line: the rest is a C++ backtrace.
    fn from(error: tch::TchError) -> Self {
        Self::Torch(first_line(&error.to_string()))
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

/// The pointer that libtorch's C++ side takes; the tensor outlives the call that uses it.
fn raw(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr().cast_mut()
}

fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string that lives until this thread's next failing call.
    let message = unsafe { CStr::from_ptr(bellora_last_error()) };
    Err(Error::Torch(first_line(&message.to_string_lossy())))
}

/// Has the allocator keep what it is given back, for a process that allocates the same large tensors over and over.
pub fn keep_freed_memory() {
    // SAFETY: it sets two numbers of the C library's allocator and where libtorch allocates from now on.
    unsafe { bellora_keep_freed_memory() }
}

/// Takes over a tensor that the shim made.
fn taken(code: c_int, tensor: *mut C_tensor) -> Result<Tensor> {
    check(code)?;
    // SAFETY: on success the shim hands over a heap-allocated tensor that nobody else frees.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

/// Takes over two tensors that the shim made.
fn taken_two(code: c_int, first: *mut C_tensor, second: *mut C_tensor) -> Result<(Tensor, Tensor)> {
    check(code)?;
    Ok((taken(code, first)?, taken(code, second)?))
}

/// Computes `out = beta * out + alpha * a b` in place; `out` may be a view with a row stride.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn addmm_(out: &Tensor, a: &Tensor, b: &Tensor, beta: f64, alpha: f64) -> Result<()> {
    // SAFETY: all three are live tensors for the length of the call.
    check(unsafe { bellora_addmm(raw(out), raw(a), raw(b), beta, alpha) })
}

/// Computes `x wᵀ` of fp32 CPU tensors by oneDNN: `[N, I] x [O, I] -> [N, O]`; `w` may be a transposed view.
///
/// # Errors
/// Shapes or dtypes that do not fit; a libtorch built without oneDNN.
pub fn onednn_linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: both are live tensors for the length of the call; `out` is written on success.
    let code = unsafe { bellora_onednn_linear(raw(x), raw(w), &mut out) };
    taken(code, out)
}

/// The numbers of one AdamW update. The tensors are 0-d and lie on the parameters' device, so that nothing waits for them.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep<'a> {
    /// Learning rate of this update, fp64 on the CPU and fp32 on a GPU.
    pub lr: &'a Tensor,
    /// How many updates there will have been with this one (from 1), fp32.
    pub update: &'a Tensor,
    /// What gradients are divided by first, fp32.
    pub grad_divisor: &'a Tensor,
    /// 1 leaves everything as it is, 0 does not; fp32.
    pub skip: &'a Tensor,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Applies one AdamW update to flat fp32 buffers `[P]` in one pass; the gradients come out divided.
///
/// # Errors
/// Buffers of different lengths or dtypes.
pub fn fused_adamw_(
    param: &Tensor,
    grad: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    numbers: AdamWStep,
) -> Result<()> {
    // SAFETY: all eight are live tensors for the length of the call.
    check(unsafe {
        bellora_fused_adamw(
            raw(param),
            raw(grad),
            raw(exp_avg),
            raw(exp_avg_sq),
            raw(numbers.update),
            raw(numbers.lr),
            raw(numbers.grad_divisor),
            raw(numbers.skip),
            numbers.betas[0],
            numbers.betas[1],
            numbers.weight_decay,
            numbers.eps,
        )
    })
}

/// Asserts what the row kernels take for granted; they see memory, not shapes.
fn assert_rows(tensors: &[(&Tensor, &[i64])]) {
    for (tensor, shape) in tensors {
        assert_eq!(tensor.size(), *shape, "shape of a row kernel's operand");
        assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "a row kernel's operand is contiguous");
    }
}

/// RMSNorm of the rows of `x` `[N, D]` by `weight` `[D]` of the same dtype; with `add` first `x += add` in place.
/// Returns `y` and the fp32 reciprocal root mean squares `[N, 1]`.
///
/// # Errors
/// A dtype without row kernels.
pub fn rms_norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (n, d) = x.size2()?;
    assert_rows(&[(x, &[n, d]), (add.unwrap_or(x), &[n, d]), (weight, &[d])]);
    let (mut y, mut rstd) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the operands live through the call, have the shapes the kernel reads and one dtype (checked by it).
    let code = unsafe {
        let add = add.map_or(std::ptr::null_mut(), raw);
        bellora_rms_norm(raw(x), add, raw(weight), eps, &mut y, &mut rstd)
    };
    taken_two(code, y, rstd)
}

/// The gradient of [`rms_norm`]'s `x` plus `dresidual`, and `y` again; all `[N, D]`, `rstd` `[N, 1]`.
///
/// # Errors
/// A dtype without row kernels.
pub fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    dresidual: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (n, d) = x.size2()?;
    assert_rows(&[(dy, &[n, d]), (x, &[n, d]), (weight, &[d]), (rstd, &[n, 1]), (dresidual, &[n, d])]);
    let (mut dx, mut y) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: as in `rms_norm`.
    let code =
        unsafe { bellora_rms_norm_backward(raw(dy), raw(x), raw(weight), raw(rstd), raw(dresidual), &mut dx, &mut y) };
    taken_two(code, dx, y)
}

/// `silu(g) ⊙ u` of `[g | u]` `[N, 2F]`.
///
/// # Errors
/// A dtype without row kernels.
pub fn swiglu(gu: &Tensor) -> Result<Tensor> {
    let (n, f2) = gu.size2()?;
    assert_rows(&[(gu, &[n, f2])]);
    let mut h = std::ptr::null_mut();
    // SAFETY: as in `rms_norm`.
    let code = unsafe { bellora_swiglu(raw(gu), &mut h) };
    taken(code, h)
}

/// `[dg | du]` `[N, 2F]` from `dh` `[N, F]`, and `h` again.
///
/// # Errors
/// A dtype without row kernels.
pub fn swiglu_backward(dh: &Tensor, gu: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, f2) = gu.size2()?;
    assert_rows(&[(gu, &[n, f2]), (dh, &[n, f2 / 2])]);
    let (mut dgu, mut h) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: as in `rms_norm`.
    let code = unsafe { bellora_swiglu_backward(raw(dh), raw(gu), &mut dgu, &mut h) };
    taken_two(code, dgu, h)
}

/// Rotates `x` `[N, heads, E]`, whose rows are contiguous, in place; `cos` and `sin` fp32 `[N, E/2]`.
///
/// # Errors
/// A dtype without row kernels.
pub fn rope_(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<()> {
    let (n, _, e) = x.size3()?;
    assert!(x.stride()[1..] == [e, 1] && x.device() == Device::Cpu, "rows of heads side by side");
    assert_rows(&[(cos, &[n, e / 2]), (sin, &[n, e / 2])]);
    // SAFETY: as in `rms_norm`; rows may lie apart, by the stride that the kernel reads.
    check(unsafe { bellora_rope(raw(x), raw(cos), raw(sin), sign) })
}

/// Overwrites the first `vocab_size` columns of `logits` `[N, P]` by `weight · (softmax - onehot)` of those columns and
/// the others by zero, and returns the sum of `weight · nll`.
///
/// # Errors
/// A dtype without row kernels.
pub fn cross_entropy_(logits: &Tensor, vocab_size: i64, targets: &Tensor, weights: &Tensor) -> Result<f64> {
    let (n, padded) = logits.size2()?;
    assert!(vocab_size <= padded, "{vocab_size} of {padded} logits");
    assert_rows(&[(logits, &[n, padded]), (targets, &[n]), (weights, &[n])]);
    if n > 0 {
        let (least, most) = (targets.f_min()?.f_int64_value(&[])?, targets.f_max()?.f_int64_value(&[])?);
        assert!(least >= 0 && most < vocab_size, "targets {least} to {most} of {vocab_size} logits");
    }
    let mut loss = 0.0;
    // SAFETY: as in `rms_norm`; targets were checked against the row length.
    check(unsafe { bellora_cross_entropy(raw(logits), vocab_size, raw(targets), raw(weights), &mut loss) })?;
    Ok(loss)
}

/// Elements whose squares a GPU sums at a time: their fp64 copies are 128 MB.
const SQUARED_AT_ONCE: i64 = 1 << 24;

/// Sums the squares of a contiguous fp32 tensor in fp64, the same on any number of threads; 0-d on its device.
///
/// # Errors
/// A tensor of another dtype; memory that runs out.
///
/// # Panics
/// If the tensor is not contiguous: a defect of the caller.
pub fn sum_of_squares(x: &Tensor) -> Result<Tensor> {
    assert!(x.is_contiguous(), "squares of a contiguous tensor");
    if x.device() != Device::Cpu {
        let total = Tensor::f_zeros([0i64; 0], (Kind::Double, x.device()))?;
        for piece in x.f_split(SQUARED_AT_ONCE, 0)? {
            let _ = total.shallow_clone().f_add_(&piece.f_to_kind(Kind::Double)?.f_square_()?.f_sum(Kind::Double)?)?;
        }
        return Ok(total);
    }
    let mut sum = 0.0;
    // SAFETY: `x` is a live tensor for the length of the call, its elements side by side; the shim refuses another dtype
    // than fp32; `sum` is written on success.
    check(unsafe { bellora_sum_of_squares(raw(x), &mut sum) })?;
    filled(&[], sum, (Kind::Double, Device::Cpu))
}

/// Where one input's dropout mask stands in the run, besides its rows' origin.
#[derive(Debug, Clone, Copy)]
pub struct MaskDraw {
    /// The run's seed.
    pub seed: u64,
    /// The 0-based step.
    pub step: u32,
    /// The input's number in the model.
    pub site: u32,
    /// A 16-bit draw below this is dropped.
    pub drop_below: u32,
}

/// Drops elements of `x` `[N, C]` (unit column stride) and scales the others up; `slot` and `token` are i64 `[N]`.
///
/// # Errors
/// A dtype that is no float's; memory that runs out.
///
/// # Panics
/// If the tensors do not have these shapes and strides or are not on the CPU: a defect of the caller.
pub fn dropout(x: &Tensor, slot: &Tensor, token: &Tensor, draw: MaskDraw) -> Result<Tensor> {
    let (n, c) = x.size2()?;
    let stride = x.stride();
    assert!(c <= 1 || stride[1] == 1, "columns side by side");
    assert!(n <= 1 || stride[0] >= c, "rows that do not overlap");
    assert!(x.device() == Device::Cpu, "dropout of a CPU tensor");
    assert_rows(&[(slot, &[n]), (token, &[n])]);
    let mut out = std::ptr::null_mut();
    // SAFETY: the three inputs are live tensors for the length of the call, of the shapes and strides that the kernel
    // reads by (the shim refuses other dtypes); `out` is written on success.
    let code = unsafe {
        bellora_dropout(raw(x), raw(slot), raw(token), draw.seed, draw.step, draw.site, draw.drop_below, &mut out)
    };
    taken(code, out)
}

/// The memory of a contiguous CPU tensor.
///
/// # Panics
/// If the tensor is not contiguous or not on the CPU: a defect of the caller.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "bytes of a contiguous CPU tensor");
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor holds `len` initialised bytes at its data pointer for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), len) }
}

/// Overwrites the memory of a contiguous CPU tensor from byte `at` on.
///
/// # Panics
/// If the tensor is not contiguous, not on the CPU or shorter than that: a defect of the caller.
pub fn write_bytes(tensor: &Tensor, at: usize, from: &[u8]) {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "bytes of a contiguous CPU tensor");
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    assert!(at <= len && from.len() <= len - at, "{} bytes at {at} of {len}", from.len());
    // SAFETY: the range lies within the tensor's own memory, as was just seen. libtorch's tensors are written through shared
    // handles as a matter of course; nobody holds a slice of this one across the call (`bytes` is borrowed for reads alone).
    unsafe { std::ptr::copy(from.as_ptr(), tensor.data_ptr().cast::<u8>().add(at), from.len()) }
}
