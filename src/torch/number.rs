//! Operations of a tensor with a number.
//!
//! tch's own wrap the number into an object that panics when it is dropped after a call that failed: out of memory would
//! end the program where it should come back as an error. These take the number as it is.

use std::ffi::c_int;

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use super::{check, raw, taken};
use crate::error::Result;

unsafe extern "C" {
    fn bellora_with_number(op: c_int, x: *mut C_tensor, number: CNumber, out: *mut *mut C_tensor) -> c_int;
    fn bellora_fill(x: *mut C_tensor, mask: *mut C_tensor, number: CNumber) -> c_int;
    fn bellora_arange(start: i64, end: i64, like: *mut C_tensor, out: *mut *mut C_tensor) -> c_int;
}

/// A number of either kind: with an integer, integer tensors stay what they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Makes integer tensors fp32.
    Float(f64),
    /// Leaves the dtype of any tensor.
    Integer(i64),
}

impl From<f64> for Number {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

impl From<i64> for Number {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

/// As the shim takes it.
#[repr(C)]
struct CNumber {
    float: f64,
    integer: i64,
    is_integer: c_int,
}

impl From<Number> for CNumber {
    fn from(number: Number) -> Self {
        match number {
            Number::Float(float) => Self { float, integer: 0, is_integer: 0 },
            Number::Integer(integer) => Self { float: 0.0, integer, is_integer: 1 },
        }
    }
}

/// The shim knows them by their place.
#[derive(Debug, Clone, Copy)]
enum Op {
    Add,
    Multiply,
    MultiplyInPlace,
    Divide,
    Remainder,
    AtLeast,
    AtMost,
    IsEqual,
    IsBelow,
    IsAtLeast,
    And,
    Or,
    Xor,
    ShiftRight,
}

/// What a tensor does with a number. Each gives a new tensor, but for those that end in `_`.
///
/// # Errors
/// All of them: memory that runs out; a dtype that does not have the operation.
pub trait WithNumber {
    /// The sum.
    fn f_plus(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The product.
    fn f_times(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The product, in place.
    fn f_times_(&self, number: impl Into<Number>) -> Result<()>;
    /// The quotient.
    fn f_over(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The remainder, of the sign of the number.
    fn f_modulo(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The greater of each element and the number.
    fn f_at_least(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The smaller of each element and the number.
    fn f_at_most(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// Whether each element is the number.
    fn f_is(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// Whether each element is less than the number.
    fn f_is_below(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// Whether each element is the number or more.
    fn f_is_from(&self, number: impl Into<Number>) -> Result<Tensor>;
    /// The bits of both.
    fn f_bits_and(&self, number: i64) -> Result<Tensor>;
    /// The bits of either.
    fn f_bits_or(&self, number: i64) -> Result<Tensor>;
    /// The bits of one alone.
    fn f_bits_xor(&self, number: i64) -> Result<Tensor>;
    /// The bits moved down by so many places; the sign stays.
    fn f_bits_down(&self, places: i64) -> Result<Tensor>;
    /// Overwrites every element.
    fn f_fill_with_(&self, number: impl Into<Number>) -> Result<()>;
    /// Overwrites the elements where `mask` is true; it has the tensor's shape or one that broadcasts to it.
    fn f_fill_where_(&self, mask: &Tensor, number: impl Into<Number>) -> Result<()>;
}

fn with_number(op: Op, x: &Tensor, number: impl Into<Number>) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `x` is a live tensor for the length of the call; `out` is written on success.
    let code = unsafe { bellora_with_number(op as c_int, raw(x), number.into().into(), &mut out) };
    taken(code, out)
}

impl WithNumber for Tensor {
    fn f_plus(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::Add, self, number)
    }

    fn f_times(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::Multiply, self, number)
    }

    fn f_times_(&self, number: impl Into<Number>) -> Result<()> {
        with_number(Op::MultiplyInPlace, self, number).map(|_| ())
    }

    fn f_over(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::Divide, self, number)
    }

    fn f_modulo(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::Remainder, self, number)
    }

    fn f_at_least(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::AtLeast, self, number)
    }

    fn f_at_most(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::AtMost, self, number)
    }

    fn f_is(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::IsEqual, self, number)
    }

    fn f_is_below(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::IsBelow, self, number)
    }

    fn f_is_from(&self, number: impl Into<Number>) -> Result<Tensor> {
        with_number(Op::IsAtLeast, self, number)
    }

    fn f_bits_and(&self, number: i64) -> Result<Tensor> {
        with_number(Op::And, self, number)
    }

    fn f_bits_or(&self, number: i64) -> Result<Tensor> {
        with_number(Op::Or, self, number)
    }

    fn f_bits_xor(&self, number: i64) -> Result<Tensor> {
        with_number(Op::Xor, self, number)
    }

    fn f_bits_down(&self, places: i64) -> Result<Tensor> {
        with_number(Op::ShiftRight, self, places)
    }

    fn f_fill_with_(&self, number: impl Into<Number>) -> Result<()> {
        // SAFETY: `self` is a live tensor for the length of the call.
        check(unsafe { bellora_fill(raw(self), std::ptr::null_mut(), number.into().into()) })
    }

    fn f_fill_where_(&self, mask: &Tensor, number: impl Into<Number>) -> Result<()> {
        // SAFETY: both are live tensors for the length of the call.
        check(unsafe { bellora_fill(raw(self), raw(mask), number.into().into()) })
    }
}

/// A tensor of one number.
///
/// # Errors
/// Memory that runs out.
pub fn filled(shape: &[i64], number: impl Into<Number>, options: (Kind, Device)) -> Result<Tensor> {
    let tensor = Tensor::f_empty(shape, options)?;
    tensor.f_fill_with_(number)?;
    Ok(tensor)
}

/// The integers from `start` up to `end`, which is left out: `[end - start]`.
///
/// # Errors
/// Memory that runs out.
pub fn range(start: i64, end: i64, options: (Kind, Device)) -> Result<Tensor> {
    let like = Tensor::f_empty([0i64; 1], options)?;
    let mut out = std::ptr::null_mut();
    // SAFETY: `like` is a live tensor for the length of the call; `out` is written on success.
    let code = unsafe { bellora_arange(start, end, raw(&like), &mut out) };
    taken(code, out)
}
