// What tch leaves out of libtorch, behind a C interface: product options, fused AdamW, and the few CPU loops that
// libtorch's own ops would spread over many passes of memory. Every function returns 0, or -1 with a message.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

using T = at::Tensor*;

static thread_local std::string last_error;

template <typename F>
static int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return -1;
}

// Several machine levels of one loop, chosen at start: the program is built once for all x86-64 processors.
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

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

extern "C" {

const char* bellora_last_error() { return last_error.c_str(); }

// out = beta * out + alpha * a b
int bellora_addmm(T out, T a, T b, double beta, double alpha) {
  return guarded([&] { at::addmm_out(*out, *out, *a, *b, beta, alpha); });
}

// `step` is a 0-d float tensor that already counts this update.
int bellora_fused_adamw(T param, T grad, T exp_avg, T exp_avg_sq, T step, double lr, double beta1, double beta2,
                        double weight_decay, double eps) {
  return guarded([&] {
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {*step}, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

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
}
