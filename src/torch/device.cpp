// What a GPU needs beyond libtorch's common ops: attention over packed documents, products with an fp32 result, the
// allocator's statistics, the device's queue, and the switches of its numerics. Everything goes through the dispatcher
// and the registries of libtorch_cpu and libc10; the kernels are in libtorch_cuda, which is opened at run time or not at
// all. Every function returns 0, -1 with a message, or -2 where the loaded libtorch lacks the operation.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "shim.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

// Runs an operation that only libtorch_cuda has.
template <typename F>
static int asked(F&& body) {
  bool is_lacking = false;
  const int code = guarded([&] {
    try {
      body();
    } catch (const c10::NotImplementedError&) {
      is_lacking = true;
      throw;
    } catch (const c10::Error& e) {
      is_lacking = std::string_view(e.what_without_backtrace()).find("was not enabled for build") != std::string_view::npos;
      throw;
    }
  });
  return is_lacking ? -2 : code;
}

// xformers' name for "a query sees the keys up to its own position, both counted from the document's start".
static constexpr int64_t kCausalFromTopLeft = 1;

// Flash attention has another, transposed path for documents of one token with grouped heads, whose saved state its
// backward does not read. A longest document of two avoids it and costs nothing.
static int64_t flash_longest(int64_t longest) { return std::max<int64_t>(longest, 2); }

static c10::DeviceAllocator& allocator() {
  // The allocator knows no device before this.
  at::globalContext().lazyInitDevice(at::kCUDA);
  return *c10::getDeviceAllocator(at::kCUDA);
}

extern "C" {

// q [N, H, E], k and v [N, K, E] with unit strides within a row; cu [documents + 1] int32. o [N, H, E], lse [H, N] fp32.
int bellora_flash_forward(T q, T k, T v, T cu, int64_t longest, T* o_out, T* lse_out) {
  return asked([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const int64_t most = flash_longest(longest);
    auto result = at::_flash_attention_forward(*q, *k, *v, *cu, *cu, most, most, /*dropout_p=*/0.0, /*is_causal=*/true,
                                               /*return_debug_mask=*/false);
    *o_out = new at::Tensor(std::get<0>(result));
    *lse_out = new at::Tensor(std::get<1>(result));
  });
}

int bellora_flash_backward(T d_o, T q, T k, T v, T o, T lse, T cu, int64_t longest, T* dq, T* dk, T* dv) {
  return asked([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const int64_t most = flash_longest(longest);
    // Without dropout the state is not read, but the operation wants it.
    const at::Tensor state = at::empty({2}, q->options().dtype(c10::kUInt64));
    auto result = at::_flash_attention_backward(*d_o, *q, *k, *v, *o, *lse, *cu, *cu, most, most, /*dropout_p=*/0.0,
                                                /*is_causal=*/true, state, state);
    *dq = new at::Tensor(std::get<0>(result));
    *dk = new at::Tensor(std::get<1>(result));
    *dv = new at::Tensor(std::get<2>(result));
  });
}

// q, k and v [1, N, H, E] with unit strides within a row; cu [documents + 1] int32. o [1, N, H, E],
// lse [documents, H, longest rounded up to 32] fp32.
int bellora_efficient_forward(T q, T k, T v, T cu, int64_t longest, T* o_out, T* lse_out) {
  return asked([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    auto result = at::_efficient_attention_forward(*q, *k, *v, /*bias=*/std::nullopt, *cu, *cu, longest, longest,
                                                   /*dropout_p=*/0.0, kCausalFromTopLeft,
                                                   /*compute_log_sumexp=*/true);
    *o_out = new at::Tensor(std::get<0>(result));
    *lse_out = new at::Tensor(std::get<1>(result));
  });
}

int bellora_efficient_backward(T d_o, T q, T k, T v, T o, T lse, T cu, int64_t longest, T* dq, T* dk, T* dv) {
  return asked([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const at::Tensor state = at::empty({1}, at::TensorOptions().dtype(at::kLong));
    auto result = at::_efficient_attention_backward(*d_o, *q, *k, *v, /*bias=*/std::nullopt, *o, *cu, *cu, longest,
                                                    longest, *lse, /*dropout_p=*/0.0, state, state, kCausalFromTopLeft,
                                                    /*bias_requires_grad=*/false);
    *dq = new at::Tensor(std::get<0>(result));
    *dk = new at::Tensor(std::get<1>(result));
    *dv = new at::Tensor(std::get<2>(result));
  });
}

// out += a b with fp32 `out` and half-precision operands.
int bellora_addmm_fp32(T out, T a, T b) {
  return asked([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    at::addmm_out(*out, *out, *a, *b, at::kFloat, /*beta=*/1, /*alpha=*/1);
  });
}

// Bytes: allocated now, allocated at most since the last reset, reserved from the device, free on the device, reserved at most
// since the last reset. The last number counts allocations that succeeded only after all unused memory was given back.
int bellora_cuda_memory(int index, int64_t* out) {
  return asked([&] {
    auto& from = allocator();
    const auto stats = from.getDeviceStats(static_cast<c10::DeviceIndex>(index));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[all].current;
    out[1] = stats.allocated_bytes[all].peak;
    out[2] = stats.reserved_bytes[all].current;
    out[4] = stats.reserved_bytes[all].peak;
    out[5] = stats.num_alloc_retries;
    out[3] = static_cast<int64_t>(from.getMemoryInfo(static_cast<c10::DeviceIndex>(index)).first);
  });
}

int bellora_cuda_reset_peak(int index) {
  return asked([&] { allocator().resetPeakStats(static_cast<c10::DeviceIndex>(index)); });
}

int bellora_cuda_release_cached() {
  return asked([&] { allocator().emptyCache(); });
}

// Waits until everything that was queued on a GPU is done.
int bellora_cuda_synchronize(int index) {
  return asked([&] { c10::impl::VirtualGuardImpl(c10::kCUDA).synchronizeDevice(static_cast<c10::DeviceIndex>(index)); });
}

// Sets the library of products, by the number of at::BlasBackend, and gives the one before.
int bellora_prefer_blas(int which, int* before) {
  return asked([&] {
    auto& context = at::globalContext();
    *before = static_cast<int>(context.blasPreferredBackend());
    context.setBlasPreferredBackend(static_cast<at::BlasBackend>(which));
  });
}

// Products of fp16 and bf16 add up in fp32 throughout, those of fp32 keep all their digits; with `deterministic`, ops
// whose sums have no fixed order take another form.
int bellora_set_numerics(bool deterministic) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setAllowFP16ReductionCuBLAS(false);
    context.setAllowBF16ReductionCuBLAS(false);
    context.setAllowFP16AccumulationCuBLAS(false);
    context.setAllowTF32CuBLAS(false);
    context.setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
    // Else every empty tensor would be filled first.
    context.setDeterministicFillUninitializedMemory(false);
  });
}
}
