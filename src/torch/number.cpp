// Operations of a tensor with a number, without tch's `Scalar`, which panics when a call that it was handed to has failed.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/bitwise_xor.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/remainder.h>

#include "shim.h"

// As src/torch/number.rs has it.
struct Number {
  double real;
  int64_t integer;
  int is_integer;

  operator at::Scalar() const { return is_integer ? at::Scalar(integer) : at::Scalar(real); }
};

// In the order of `Op` in src/torch/number.rs.
enum Op {
  kAdd,
  kMultiply,
  kMultiplyInPlace,
  kDivide,
  kRemainder,
  kAtLeast,
  kAtMost,
  kIsEqual,
  kIsBelow,
  kIsAtLeast,
  kAnd,
  kOr,
  kXor,
  kShiftRight,
};

static at::Tensor with_number(Op op, at::Tensor& x, const at::Scalar& number) {
  switch (op) {
    case kAdd: return at::add(x, number);
    case kMultiply: return at::mul(x, number);
    case kMultiplyInPlace: return x.mul_(number);
    case kDivide: return at::div(x, number);
    case kRemainder: return at::remainder(x, number);
    case kAtLeast: return at::clamp_min(x, number);
    case kAtMost: return at::clamp_max(x, number);
    case kIsEqual: return at::eq(x, number);
    case kIsBelow: return at::lt(x, number);
    case kIsAtLeast: return at::ge(x, number);
    case kAnd: return at::bitwise_and(x, number);
    case kOr: return at::bitwise_or(x, number);
    case kXor: return at::bitwise_xor(x, number);
    case kShiftRight: return at::bitwise_right_shift(x, number);
  }
  TORCH_CHECK(false, "no such operation: ", static_cast<int>(op));
}

extern "C" {

int bellora_with_number(int op, T x, Number number, T* out) {
  return guarded([&] { *out = new at::Tensor(with_number(static_cast<Op>(op), *x, number)); });
}

// Overwrites all of `x`, or where `mask` (may be null) is true.
int bellora_fill(T x, T mask, Number number) {
  return guarded([&] { mask ? x->masked_fill_(*mask, number) : x->fill_(number); });
}

// start, start + 1, ... before end, in the dtype and on the device of `like`.
int bellora_arange(int64_t start, int64_t end, T like, T* out) {
  return guarded([&] { *out = new at::Tensor(at::arange(start, end, like->options())); });
}

}  // extern "C"
