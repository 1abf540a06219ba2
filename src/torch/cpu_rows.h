// Row kernels of the CPU ops: plain loops over fp32 rows that the compiler vectorises, once for every machine level.
// Rows in bf16 pass through fp32 scratch rows that stay in the first-level cache.
#pragma once

#include <c10/util/BFloat16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

// Several machine levels of one loop, chosen at start: the program is built once for all x86-64 processors.
#if defined(__x86_64__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace rows {

// e^x within two units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (coefficients of Cephes' expf).
inline __attribute__((always_inline)) float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float shifted = x * 1.44269504088896341f + kRound;
  int32_t n = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  float k = shifted - kRound;
  float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((n + 127) << 23);
}

FOR_EVERY_CPU
static void widen(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
}

// Rounds to nearest even; NaN stays NaN.
FOR_EVERY_CPU
static void narrow(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  }
}

// A row to read: itself in fp32, a widened copy in bf16.
inline const float* read(const float* row, std::vector<float>&, int64_t) { return row; }
inline const float* read(const c10::BFloat16* row, std::vector<float>& scratch, int64_t n) {
  scratch.resize(n);
  widen(reinterpret_cast<const uint16_t*>(row), scratch.data(), n);
  return scratch.data();
}

// A row to write: itself in fp32, scratch in bf16 that `put` rounds into place.
inline float* room(float* row, std::vector<float>&, int64_t) { return row; }
inline float* room(c10::BFloat16*, std::vector<float>& scratch, int64_t n) {
  scratch.resize(n);
  return scratch.data();
}
inline void put(const float*, float*, int64_t) {}
inline void put(const float* from, c10::BFloat16* row, int64_t n) {
  narrow(from, reinterpret_cast<uint16_t*>(row), n);
}

// ---- RMSNorm ----

FOR_EVERY_CPU
static float rstd(const float* x, int64_t n, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  return 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
}

FOR_EVERY_CPU
static void scale(const float* x, const float* w, float r, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

FOR_EVERY_CPU
static void add(const float* a, const float* b, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; i++) sum[i] = a[i] + b[i];
}

// dx = r (g - x r² mean(g x)) + dres with g = dy w; y = x r w
FOR_EVERY_CPU
static void rms_norm_backward(const float* dy, const float* x, const float* w, float r, const float* dres, float* dx,
                              float* y, int64_t n) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; i++) dot += dy[i] * w[i] * x[i];
  const float c = r * r * dot / static_cast<float>(n);
  for (int64_t i = 0; i < n; i++) {
    float grad = r * (dy[i] * w[i] - x[i] * c) + dres[i];
    y[i] = x[i] * r * w[i];
    dx[i] = grad;
  }
}

// ---- SwiGLU ----

FOR_EVERY_CPU
static void swiglu(const float* g, const float* u, float* h, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float sigma = 1.0f / (1.0f + fast_exp(-g[i])), silu = g[i] * sigma;
    h[i] = silu * u[i];
  }
}

FOR_EVERY_CPU
static void swiglu_backward(const float* dh, const float* g, const float* u, float* dg, float* du, float* h, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float sigma = 1.0f / (1.0f + fast_exp(-g[i])), silu = g[i] * sigma;
    dg[i] = dh[i] * u[i] * (sigma + silu * (1.0f - sigma));
    du[i] = dh[i] * silu;
    h[i] = silu * u[i];
  }
}

// ---- RoPE ----

// Rotates every head of a row in place; sign -1 turns back.
FOR_EVERY_CPU
static void rotate(float* x, const float* cos, const float* sin, float sign, int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; h++) {
    float *a = x + 2 * half * h, *b = a + half;
    for (int64_t i = 0; i < half; i++) {
      float s = sign * sin[i], na = a[i] * cos[i] - b[i] * s, nb = b[i] * cos[i] + a[i] * s;
      a[i] = na;
      b[i] = nb;
    }
  }
}

// ---- cross entropy ----

FOR_EVERY_CPU
static float largest(const float* x, int64_t n) {
  float m = x[0];
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
  return m;
}

// Overwrites x by e^(x - m) and returns the sum.
FOR_EVERY_CPU
static double exp_sum(const float* x, float m, float* out, int64_t n) {
  // Pieces, so that a row of 100,000 entries does not drown the last of them in the sum of the first.
  double total = 0;
  for (int64_t start = 0; start < n; start += 4096) {
    int64_t end = start + 4096 < n ? start + 4096 : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; i++) {
      out[i] = fast_exp(x[i] - m);
      sum += out[i];
    }
    total += sum;
  }
  return total;
}

FOR_EVERY_CPU
static void multiply(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

}  // namespace rows
