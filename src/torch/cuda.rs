//! Operations that only the CUDA half of libtorch has, and the switches of its numerics.

use std::ffi::c_int;

use tch::Tensor;
use torch_sys::C_tensor;

use super::{check, raw};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn bellora_flash_forward(
        q: *mut C_tensor,
        k: *mut C_tensor,
        v: *mut C_tensor,
        cu: *mut C_tensor,
        longest: i64,
        o: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_flash_backward(
        d_o: *mut C_tensor,
        q: *mut C_tensor,
        k: *mut C_tensor,
        v: *mut C_tensor,
        o: *mut C_tensor,
        lse: *mut C_tensor,
        cu: *mut C_tensor,
        longest: i64,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_efficient_forward(
        q: *mut C_tensor,
        k: *mut C_tensor,
        v: *mut C_tensor,
        cu: *mut C_tensor,
        longest: i64,
        o: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_efficient_backward(
        d_o: *mut C_tensor,
        q: *mut C_tensor,
        k: *mut C_tensor,
        v: *mut C_tensor,
        o: *mut C_tensor,
        lse: *mut C_tensor,
        cu: *mut C_tensor,
        longest: i64,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> c_int;
    fn bellora_addmm_fp32(out: *mut C_tensor, a: *mut C_tensor, b: *mut C_tensor) -> c_int;
    fn bellora_prefer_blas(which: c_int, before: *mut c_int) -> c_int;
    fn bellora_set_numerics(deterministic: bool) -> c_int;
}

/// What the shim returns where the loaded libtorch lacks an operation.
const LACKING: c_int = -2;

/// As [`check`], for an operation that not every libtorch has: names it and says what to install.
pub(super) fn check_op(op: &str, code: c_int) -> Result<()> {
    if code == LACKING {
        let what = "is not in the libtorch that is loaded, or not for this device and dtype";
        return Err(Error::failed(format!("libtorch's {op}"), what).hint(
            "install libtorch 2.11 with CUDA: scripts/setup.sh on the GPU machine, or LD_LIBRARY_PATH=<site-packages>/torch/lib \
             of a Python environment with a CUDA build of torch 2.11",
        ));
    }
    check(code)
}

/// Queries, keys and values of packed documents, as the two kernels take them.
#[derive(Debug, Clone, Copy)]
pub struct Qkv<'a> {
    /// `[N, H, E]`, or with a leading 1 for [`efficient_forward`].
    pub q: &'a Tensor,
    /// As `q`; [`flash_forward`] also takes fewer heads, of which `H` is a multiple.
    pub k: &'a Tensor,
    /// As `k`.
    pub v: &'a Tensor,
    /// The documents' borders, int32 on the device.
    pub cu_seqlens: &'a Tensor,
    /// The longest document.
    pub longest: i64,
}

type Backward = unsafe extern "C" fn(
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    i64,
    *mut *mut C_tensor,
    *mut *mut C_tensor,
    *mut *mut C_tensor,
) -> c_int;

type Forward = unsafe extern "C" fn(
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    *mut C_tensor,
    i64,
    *mut *mut C_tensor,
    *mut *mut C_tensor,
) -> c_int;

fn forward(op: &str, kernel: Forward, inputs: Qkv) -> Result<(Tensor, Tensor)> {
    let Qkv { q, k, v, cu_seqlens, longest } = inputs;
    let (mut o, mut lse) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the inputs are live tensors for the length of the call; on success the shim writes two tensors that nobody
    // else frees.
    check_op(op, unsafe { kernel(raw(q), raw(k), raw(v), raw(cu_seqlens), longest, &mut o, &mut lse) })?;
    // SAFETY: as said.
    Ok(unsafe { (Tensor::from_ptr(o), Tensor::from_ptr(lse)) })
}

fn backward(op: &str, kernel: Backward, d_o: &Tensor, inputs: Qkv, o: &Tensor, lse: &Tensor) -> Result<[Tensor; 3]> {
    let Qkv { q, k, v, cu_seqlens, longest } = inputs;
    let mut out = [std::ptr::null_mut(); 3];
    let [dq, dk, dv] = &mut out;
    let (d_o, o, lse, cu_seqlens) = (raw(d_o), raw(o), raw(lse), raw(cu_seqlens));
    // SAFETY: the inputs are live tensors for the length of the call; on success the shim writes three tensors that
    // nobody else frees.
    check_op(op, unsafe { kernel(d_o, raw(q), raw(k), raw(v), o, lse, cu_seqlens, longest, dq, dk, dv) })?;
    // SAFETY: as said.
    Ok(out.map(|tensor| unsafe { Tensor::from_ptr(tensor) }))
}

/// Causal flash attention within documents (compute capability 8.0 and up, fp16 and bf16, `E` a multiple of 8 up to 256).
/// Gives `o [N, H, E]` and the log-sum-exp `[H, N]`.
///
/// # Errors
/// A libtorch without it; shapes or dtypes that do not fit.
pub fn flash_forward(inputs: Qkv) -> Result<(Tensor, Tensor)> {
    forward("_flash_attention_forward", bellora_flash_forward, inputs)
}

/// The gradients of [`flash_forward`]'s `q`, `k` and `v`, in their shapes.
///
/// # Errors
/// As [`flash_forward`].
pub fn flash_backward(d_o: &Tensor, inputs: Qkv, o: &Tensor, lse: &Tensor) -> Result<[Tensor; 3]> {
    backward("_flash_attention_backward", bellora_flash_backward, d_o, inputs, o, lse)
}

/// Causal memory-efficient attention within documents (fp32 and fp16, bf16 from compute capability 8.0), all of them with
/// as many key heads as query heads. Gives `o [1, N, H, E]` and the log-sum-exp, a row a document.
///
/// # Errors
/// A libtorch without it; shapes or dtypes that do not fit.
pub fn efficient_forward(inputs: Qkv) -> Result<(Tensor, Tensor)> {
    forward("_efficient_attention_forward", bellora_efficient_forward, inputs)
}

/// The gradients of [`efficient_forward`]'s `q`, `k` and `v`, in their shapes.
///
/// # Errors
/// As [`efficient_forward`].
pub fn efficient_backward(d_o: &Tensor, inputs: Qkv, o: &Tensor, lse: &Tensor) -> Result<[Tensor; 3]> {
    backward("_efficient_attention_backward", bellora_efficient_backward, d_o, inputs, o, lse)
}

/// Computes `out += a b` for an fp32 `out` and operands of fp16 or (from compute capability 8.0) bf16, without rounding
/// the product in between.
///
/// # Errors
/// A libtorch without it, and every CPU; shapes or dtypes that do not fit.
pub fn addmm_fp32_(out: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    // SAFETY: all three are live tensors for the length of the call.
    check_op("addmm.dtype_out", unsafe { bellora_addmm_fp32(raw(out), raw(a), raw(b)) })
}

/// A library that makes a GPU's products, by its number in libtorch's `at::BlasBackend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blas(c_int);

impl Blas {
    /// cuBLAS.
    pub const CUBLAS: Self = Self(1);
    /// cuBLASLt.
    pub const CUBLASLT: Self = Self(2);

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::CUBLAS => "cublas",
            Self::CUBLASLT => "cublaslt",
            _ => "default",
        }
    }
}

/// Has a library make the products from now on, where it can; gives the one before.
///
/// # Errors
/// A libtorch without it.
pub fn prefer_blas(blas: Blas) -> Result<Blas> {
    let mut before = 0;
    // SAFETY: it sets a switch of libtorch's global context and writes one number.
    check_op("cuBLAS", unsafe { bellora_prefer_blas(blas.0, &mut before) })?;
    Ok(Blas(before))
}

/// Sets how products and sums are computed from now on: half-precision products add up in fp32, fp32 products keep their
/// digits (no TF32); `deterministic` has every op whose sums come in no fixed order take a form in which they do.
///
/// # Errors
/// A libtorch that knows other switches.
pub fn set_numerics(deterministic: bool) -> Result<()> {
    // SAFETY: it sets switches of libtorch's global context.
    check(unsafe { bellora_set_numerics(deterministic) })
}
