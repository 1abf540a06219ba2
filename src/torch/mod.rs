//! The room of libtorch: the operations that tch does not wrap, reached through a small C++ shim.
//!
//! Everything here is a safe function over tensors; `unsafe` stays inside.
#![expect(unsafe_code, reason = "the FFI room")]

use std::ffi::{CStr, c_char, c_int};

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};

unsafe extern "C" {
    fn bellora_last_error() -> *const c_char;
    fn bellora_addmm(out: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor, beta: f64, alpha: f64) -> c_int;
    fn bellora_fused_adamw(
        param: *mut C_tensor,
        grad: *mut C_tensor,
        exp_avg: *mut C_tensor,
        exp_avg_sq: *mut C_tensor,
        step: *mut C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
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

/// Takes over a tensor that the shim made.
fn taken(code: c_int, tensor: *mut C_tensor) -> Result<Tensor> {
    check(code)?;
    // SAFETY: on success the shim hands over a heap-allocated tensor that nobody else frees.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

/// Computes `out = beta * out + alpha * a b` in place; `out` may be a view with a row stride.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn addmm_(out: &Tensor, a: &Tensor, b: &Tensor, beta: f64, alpha: f64) -> Result<()> {
    // SAFETY: all three are live tensors for the length of the call.
    check(unsafe { bellora_addmm(raw(out), raw(a), raw(b), beta, alpha) })
}

/// The numbers of one AdamW update.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate of this update.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// How many updates there have been, this one included (from 1).
    pub update: u64,
}

/// Applies one AdamW update to flat fp32 buffers `[P]` in one pass.
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
    let step = Tensor::f_full([0i64; 0], numbers.update as f64, (Kind::Float, param.device()))?;
    // SAFETY: all five are live tensors for the length of the call.
    check(unsafe {
        bellora_fused_adamw(
            raw(param),
            raw(grad),
            raw(exp_avg),
            raw(exp_avg_sq),
            raw(&step),
            numbers.lr,
            numbers.betas[0],
            numbers.betas[1],
            numbers.weight_decay,
            numbers.eps,
        )
    })
}

/// Sums the squares of a contiguous fp32 CPU tensor in fp64, the same on any number of threads.
///
/// # Errors
/// A tensor of another dtype.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let mut sum = 0.0;
    // SAFETY: `x` is a live tensor for the length of the call; `sum` is written on success.
    check(unsafe { bellora_sum_of_squares(raw(x), &mut sum) })?;
    Ok(sum)
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
/// Tensors that are not on the CPU.
pub fn dropout(x: &Tensor, slot: &Tensor, token: &Tensor, draw: MaskDraw) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the three inputs are live tensors for the length of the call; `out` is written on success.
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
    assert!(tensor.is_contiguous() && tensor.device() == tch::Device::Cpu, "bytes of a contiguous CPU tensor");
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor holds `len` initialised bytes at its data pointer for as long as it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), len) }
}
