// What tch leaves out of libtorch, behind a C interface: product options, fused AdamW, and the few CPU loops that
// libtorch's own ops would spread over many passes of memory. Every function returns 0, or -1 with a message.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu_rows.h"
#include "shim.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

// ---- dropout: Philox 4x32-10, eight 16-bit draws a call ----

static constexpr int kLanes = 16;  // Philox calls computed side by side

FOR_EVERY_CPU
static void draw(uint32_t site, uint32_t token, uint32_t slot, uint32_t step, uint64_t seed, uint32_t first_block,
                 uint32_t (*words)[kLanes]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; i++) {
    c0[i] = (first_block + i) | site << 16;
    c1[i] = token;
    c2[i] = slot;
    c3[i] = step;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kLanes; i++) {
      uint64_t low = static_cast<uint64_t>(c0[i]) * 0xD2511F53u, high = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      uint32_t n0 = static_cast<uint32_t>(high >> 32) ^ c1[i] ^ k0, n2 = static_cast<uint32_t>(low >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(high);
      c3[i] = static_cast<uint32_t>(low);
      c0[i] = n0;
      c2[i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kLanes; i++) {
    words[0][i] = c0[i];
    words[1][i] = c1[i];
    words[2][i] = c2[i];
    words[3][i] = c3[i];
  }
}

template <typename S>
static void dropout_rows(const S* x, S* out, const int64_t* slot, const int64_t* token, int64_t first, int64_t last,
                         int64_t channels, int64_t x_stride, uint64_t seed, uint32_t step, uint32_t site,
                         uint32_t drop_below) {
  const float kept = 65536.0f / static_cast<float>(65536 - drop_below);
  uint32_t words[4][kLanes];
  for (int64_t n = first; n < last; n++) {
    const S* row = x + n * x_stride;
    S* to = out + n * channels;
    for (int64_t c = 0; c < channels; c += 8 * kLanes) {
      draw(site, token[n], slot[n], step, seed, c / 8, words);
      int64_t end = std::min<int64_t>(channels - c, 8 * kLanes);
      for (int64_t j = 0; j < end; j++) {
        uint32_t word = words[j % 8 / 2][j / 8], bits = j % 2 ? word >> 16 : word & 0xffff;
        to[c + j] = bits < drop_below ? S(0) : static_cast<S>(row[c + j] * kept);
      }
    }
  }
}

FOR_EVERY_CPU
static double sum_of_squares(const float* x, int64_t n) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += static_cast<double>(x[i + j]) * x[i + j];
  double sum = 0;
  for (; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  for (double s : sums) sum += s;
  return sum;
}

// Runs `body` for fp32 and bf16, the dtypes with row kernels.
#define DISPATCH_ROWS(kind, ...)                                                        \
  AT_DISPATCH_SWITCH(kind, "row kernel", AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)      \
                                             AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// Rows that one thread takes at a time: enough work to be worth a hand-over.
static int64_t grain(int64_t columns) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns)); }

static at::Tensor like(const at::Tensor& t, int64_t rows, int64_t columns) {
  return at::empty({rows, columns}, t.options());
}

extern "C" {

const char* bellora_last_error() { return last_error.c_str(); }

// out = beta * out + alpha * a b
int bellora_addmm(T out, T a, T b, double beta, double alpha) {
  return guarded([&] { at::addmm_out(*out, *out, *a, *b, beta, alpha); });
}

// y = x wᵀ in fp32 by oneDNN, whose kernels use the widest vectors of any CPU (ATen's own fp32 product is MKL's, which keeps
// to AVX2 on processors not made by Intel). `w` [O, I] may have any strides.
int bellora_onednn_linear(T x, T w, T* out) {
  return guarded([&] {
    using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                              c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
    static auto linear =
        c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
    *out = new at::Tensor(linear.call(*x, *w, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), ""));
  });
}

// All of `step`, `lr`, `grad_divisor` and `skip` are 0-d tensors on the parameters' device; `step` already counts this update.
int bellora_fused_adamw(T param, T grad, T exp_avg, T exp_avg_sq, T step, T lr, T grad_divisor, T skip, double beta1,
                        double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {*step}, *lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false, *grad_divisor, *skip);
  });
}

// A copy in pinned memory. (tch's own wrapper passes a device, which libtorch warns of.)
int bellora_pinned(T x, T* out) {
  return guarded([&] { *out = new at::Tensor(x->pin_memory()); });
}

// A mark in the present stream of a GPU, to be waited for from the host.
// A tensor of the host's memory that a GPU reads by itself: n elements of x's dtype.
int bellora_pinned_empty(T x, int64_t n, T* out) {
  return guarded([&] { *out = new at::Tensor(at::empty({n}, x->options().device(at::kCPU).pinned_memory(true))); });
}
// Copies without waiting: from pinned memory to a GPU it is queued there.
int bellora_copy_queued(T to, T from) {
  return guarded([&] { to->copy_(*from, /*non_blocking=*/true); });
}
// With `is_timed` the time of the mark can be asked for.
int bellora_event_record(int device_index, bool is_timed, void** out) {
  return guarded([&] {
    const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(device_index));
    auto event = std::make_unique<c10::Event>(
        c10::kCUDA, is_timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT);
    event->record(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(device));
    *out = event.release();
  });
}

int bellora_event_wait(void* event) {
  return guarded([&] { static_cast<c10::Event*>(event)->synchronize(); });
}

// Milliseconds between two timed events that are over.
int bellora_event_elapsed(void* first, void* second, double* out) {
  return guarded([&] { *out = static_cast<c10::Event*>(first)->elapsedTime(*static_cast<c10::Event*>(second)); });
}
void bellora_event_free(void* event) { delete static_cast<c10::Event*>(event); }

// out = x * mask / (1 - p), the mask drawn from the row's origin
int bellora_dropout(T x, T slot, T token, uint64_t seed, uint32_t step, uint32_t site, uint32_t drop_below, T* out) {
  return guarded([&] {
    at::Tensor result = at::empty(x->sizes(), x->options());
    const int64_t rows = x->size(0), channels = x->size(1), stride = x->stride(0);
    const int64_t *slots = slot->const_data_ptr<int64_t>(), *tokens = token->const_data_ptr<int64_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x->scalar_type(), "dropout", [&] {
      const scalar_t* from = x->const_data_ptr<scalar_t>();
      scalar_t* to = result.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
        dropout_rows(from, to, slots, tokens, first, last, channels, stride, seed, step, site, drop_below);
      });
    });
    *out = new at::Tensor(std::move(result));
  });
}

// The sum of squares of a contiguous fp32 buffer in fp64; pieces of a fixed size, so that it is the same on any number of
// threads.
int bellora_sum_of_squares(T x, double* out) {
  return guarded([&] {
    constexpr int64_t kPiece = 1 << 14;
    const float* from = x->const_data_ptr<float>();
    const int64_t n = x->numel(), pieces = (n + kPiece - 1) / kPiece;
    std::vector<double> sums(pieces);
    at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) sums[i] = sum_of_squares(from + i * kPiece, std::min(kPiece, n - i * kPiece));
    });
    double sum = 0;
    for (double s : sums) sum += s;
    *out = sum;
  });
}

// If `add` is given, x += add in place first. y = x r w with r = 1 / sqrt(mean(x²) + eps), in fp32 [N, 1].
int bellora_rms_norm(T x, T add, T weight, double eps, T* y_out, T* rstd_out) {
  return guarded([&] {
    const int64_t n = x->size(0), d = x->size(1);
    at::Tensor y = like(*x, n, d), rstd = at::empty({n, 1}, x->options().dtype(at::kFloat));
    float* r = rstd.mutable_data_ptr<float>();
    DISPATCH_ROWS(x->scalar_type(), [&] {
      scalar_t *xs = x->mutable_data_ptr<scalar_t>(), *ys = y.mutable_data_ptr<scalar_t>();
      const scalar_t* adds = add ? add->const_data_ptr<scalar_t>() : nullptr;
      std::vector<float> weight_scratch;
      const float* w = rows::read(weight->const_data_ptr<scalar_t>(), weight_scratch, d);
      at::parallel_for(0, n, grain(d), [&](int64_t first, int64_t last) {
        std::vector<float> x_scratch, add_scratch, sum_scratch, y_scratch;
        for (int64_t i = first; i < last; i++) {
          const float* row = rows::read(xs + i * d, x_scratch, d);
          if (adds) {
            float* sum = rows::room(xs + i * d, sum_scratch, d);
            rows::add(row, rows::read(adds + i * d, add_scratch, d), sum, d);
            rows::put(sum, xs + i * d, d);
            row = rows::read(xs + i * d, x_scratch, d);
          }
          r[i] = rows::rstd(row, d, static_cast<float>(eps));
          float* to = rows::room(ys + i * d, y_scratch, d);
          rows::scale(row, w, r[i], to, d);
          rows::put(to, ys + i * d, d);
        }
      });
    });
    *y_out = new at::Tensor(std::move(y));
    *rstd_out = new at::Tensor(std::move(rstd));
  });
}

// dx = r (g - x r² mean(g x)) + dresidual with g = dy w, and y again.
int bellora_rms_norm_backward(T dy, T x, T weight, T rstd, T dresidual, T* dx_out, T* y_out) {
  return guarded([&] {
    const int64_t n = x->size(0), d = x->size(1);
    at::Tensor dx = like(*x, n, d), y = like(*x, n, d);
    const float* r = rstd->const_data_ptr<float>();
    DISPATCH_ROWS(x->scalar_type(), [&] {
      const scalar_t *dys = dy->const_data_ptr<scalar_t>(), *xs = x->const_data_ptr<scalar_t>();
      const scalar_t* res = dresidual->const_data_ptr<scalar_t>();
      scalar_t *dxs = dx.mutable_data_ptr<scalar_t>(), *ys = y.mutable_data_ptr<scalar_t>();
      std::vector<float> weight_scratch;
      const float* w = rows::read(weight->const_data_ptr<scalar_t>(), weight_scratch, d);
      at::parallel_for(0, n, grain(d), [&](int64_t first, int64_t last) {
        std::vector<float> s1, s2, s3, s4, s5;
        for (int64_t i = first; i < last; i++) {
          float *to_dx = rows::room(dxs + i * d, s4, d), *to_y = rows::room(ys + i * d, s5, d);
          rows::rms_norm_backward(rows::read(dys + i * d, s1, d), rows::read(xs + i * d, s2, d), w, r[i],
                                  rows::read(res + i * d, s3, d), to_dx, to_y, d);
          rows::put(to_dx, dxs + i * d, d);
          rows::put(to_y, ys + i * d, d);
        }
      });
    });
    *dx_out = new at::Tensor(std::move(dx));
    *y_out = new at::Tensor(std::move(y));
  });
}

// h = silu(g) u of [g | u]
int bellora_swiglu(T gu, T* h_out) {
  return guarded([&] {
    const int64_t n = gu->size(0), f = gu->size(1) / 2;
    at::Tensor h = like(*gu, n, f);
    DISPATCH_ROWS(gu->scalar_type(), [&] {
      const scalar_t* from = gu->const_data_ptr<scalar_t>();
      scalar_t* to = h.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, n, grain(f), [&](int64_t first, int64_t last) {
        std::vector<float> s1, s2, s3;
        for (int64_t i = first; i < last; i++) {
          float* row = rows::room(to + i * f, s3, f);
          rows::swiglu(rows::read(from + 2 * i * f, s1, f), rows::read(from + (2 * i + 1) * f, s2, f), row, f);
          rows::put(row, to + i * f, f);
        }
      });
    });
    *h_out = new at::Tensor(std::move(h));
  });
}

// [dg | du] and h again
int bellora_swiglu_backward(T dh, T gu, T* dgu_out, T* h_out) {
  return guarded([&] {
    const int64_t n = gu->size(0), f = gu->size(1) / 2;
    at::Tensor dgu = like(*gu, n, 2 * f), h = like(*gu, n, f);
    DISPATCH_ROWS(gu->scalar_type(), [&] {
      const scalar_t *dhs = dh->const_data_ptr<scalar_t>(), *gus = gu->const_data_ptr<scalar_t>();
      scalar_t *dgus = dgu.mutable_data_ptr<scalar_t>(), *hs = h.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, n, grain(f), [&](int64_t first, int64_t last) {
        std::vector<float> s1, s2, s3, s4, s5, s6;
        for (int64_t i = first; i < last; i++) {
          scalar_t *to_dg = dgus + 2 * i * f, *to_du = to_dg + f, *to_h = hs + i * f;
          float *dg = rows::room(to_dg, s4, f), *du = rows::room(to_du, s5, f), *hr = rows::room(to_h, s6, f);
          rows::swiglu_backward(rows::read(dhs + i * f, s1, f), rows::read(gus + 2 * i * f, s2, f),
                                rows::read(gus + (2 * i + 1) * f, s3, f), dg, du, hr, f);
          rows::put(dg, to_dg, f);
          rows::put(du, to_du, f);
          rows::put(hr, to_h, f);
        }
      });
    });
    *dgu_out = new at::Tensor(std::move(dgu));
    *h_out = new at::Tensor(std::move(h));
  });
}

// Rotates x [N, heads, E] (unit strides within a row) in place; cos and sin fp32 [N, E/2]; sign -1 turns back.
int bellora_rope(T x, T cos, T sin, double sign) {
  return guarded([&] {
    const int64_t n = x->size(0), heads = x->size(1), half = x->size(2) / 2, width = 2 * heads * half, stride = x->stride(0);
    const float *c = cos->const_data_ptr<float>(), *s = sin->const_data_ptr<float>();
    DISPATCH_ROWS(x->scalar_type(), [&] {
      scalar_t* xs = x->mutable_data_ptr<scalar_t>();
      at::parallel_for(0, n, grain(width), [&](int64_t first, int64_t last) {
        std::vector<float> scratch;
        for (int64_t i = first; i < last; i++) {
          float* row = const_cast<float*>(rows::read(xs + i * stride, scratch, width));
          rows::rotate(row, c + i * half, s + i * half, static_cast<float>(sign), heads, half);
          rows::put(row, xs + i * stride, width);
        }
      });
    });
  });
}

// Overwrites the first V columns of logits [N, P] by weight · (softmax - onehot), the others by zero, and sums weight · nll
// in fp64.
int bellora_cross_entropy(T logits, int64_t v, T targets, T weights, double* loss_out) {
  return guarded([&] {
    const int64_t n = logits->size(0), stride = logits->size(1);
    const int64_t* target = targets->const_data_ptr<int64_t>();
    const float* weight = weights->const_data_ptr<float>();
    std::vector<double> losses(n);
    DISPATCH_ROWS(logits->scalar_type(), [&] {
      scalar_t* xs = logits->mutable_data_ptr<scalar_t>();
      at::parallel_for(0, n, grain(v), [&](int64_t first, int64_t last) {
        std::vector<float> s1, s2;
        for (int64_t i = first; i < last; i++) {
          scalar_t* row = xs + i * stride;
          const float* x = rows::read(row, s1, v);
          const float m = rows::largest(x, v), at_target = x[target[i]];
          float* p = rows::room(row, s2, v);
          const double sum = rows::exp_sum(x, m, p, v);
          losses[i] = weight[i] * (std::log(sum) + m - at_target);
          rows::multiply(p, static_cast<float>(weight[i] / sum), v);
          p[target[i]] -= weight[i];
          rows::put(p, row, v);
          std::fill(row + v, row + stride, scalar_t(0));
        }
      });
    });
    double sum = 0;
    for (double l : losses) sum += l;
    *loss_out = sum;
  });
}
}
