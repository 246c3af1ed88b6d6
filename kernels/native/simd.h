// Vectors of the instruction set that a file is compiled for, and the element types as operations on them, so that every
// kernel is written once.
//
// A "dword" is the 32-bit unit that a multiply consumes per lane: one float, or two neighbouring bf16.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// These run inside loops that keep their sums in registers, which a call would spill.
#define PD_INLINE inline __attribute__((always_inline))

namespace pd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef uint32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef uint64_t W __attribute__((vector_size(4 * kLanes)));

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

PD_INLINE V set1(float x) { return V{} + x; }
PD_INLINE I set1(uint32_t x) { return I{} + x; }

template <class To>
PD_INLINE To load_as(const void* p) {
  To v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class From>
PD_INLINE void store_as(void* p, From v) {
  std::memcpy(p, &v, sizeof v);
}

PD_INLINE V load(const float* p) { return load_as<V>(p); }
PD_INLINE void store(float* p, V v) { store_as(p, v); }

}  // namespace pd

// Each defines, beside the operations named below, `load(p, n)` and `store(p, v, n)` of the first n lanes, n clipped to
// 0..kLanes; what is not loaded is zero.
#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace pd {

PD_INLINE I load_dwords(const void* p, int64_t n) { return (I)load(static_cast<const float*>(p), n); }

PD_INLINE V widen(H x) { return (V)(__builtin_convertvector(x, I) << 16); }

// bf16 by rounding to nearest, ties to even; NaN stays NaN.
PD_INLINE H narrow(V x) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);
#else
  const I bits = (I)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : set1(0x7fc0u), H);
#endif
}

// Calls use(vector of the first n) through a copy: no instruction set but AVX-512 loads part of a vector of 16-bit lanes.
PD_INLINE V load(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return widen(load_as<H>(p));
  uint16_t part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return widen(load_as<H>(part));
}

PD_INLINE void store(uint16_t* p, V v, int64_t n) {
  if (n >= kLanes) return store_as(p, narrow(v));
  const H part = narrow(v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// An element type has: the type T in memory; what an operand of a product is held in, kPerDword of them in a dword;
// `dwords` of memory as operands; and `dot`, acc += a b summed over the elements of each dword.
struct F32 {
  using T = float;
  using Operand = float;
  static constexpr int kPerDword = 1;
  static constexpr bool kHalves = false;
  static PD_INLINE I dwords(const T* p, int64_t n) { return load_dwords(p, n); }
  static PD_INLINE V dot(V acc, I a, I b) { return fma((V)a, (V)b, acc); }
};

#if defined(__AVX512BF16__)

struct BF16 {
  using T = uint16_t;
  using Operand = uint16_t;
  static constexpr int kPerDword = 2;
  static constexpr bool kHalves = false;
  static PD_INLINE I dwords(const T* p, int64_t n) { return load_dwords(p, n); }
  static PD_INLINE V dot(V acc, I a, I b) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
using BF16Pairs = BF16;

#else

// Widened as it is read: products are of float32.
struct BF16 {
  using T = uint16_t;
  using Operand = float;
  static constexpr int kPerDword = 1;
  static constexpr bool kHalves = false;
  static PD_INLINE I dwords(const T* p, int64_t n) { return (I)load(p, n); }
  static PD_INLINE V dot(V acc, I a, I b) { return fma((V)a, (V)b, acc); }
};

// Two in a dword, as weights are packed: a product of widened rows takes first the even ones, then the odd ones.
struct BF16Pairs {
  using T = uint16_t;
  static constexpr int kPerDword = 2;
  static constexpr bool kHalves = true;
  template <int HALF>
  static PD_INLINE V half(I x) {
    return HALF == 0 ? (V)(x << 16) : (V)(x & 0xffff0000u);
  }
};

#endif

// 2^x, relative error below 2 ulp (coefficients of Cephes' exp2f); exactly 1 at 0 and exactly 0 at -inf.
PD_INLINE V exp2(V x) {
  x = min(max(x, set1(-200.0f)), set1(254.0f));
  const V n = round(x), f = x - n;
  V p = set1(1.535336188e-4f);
  p = fma(p, f, set1(1.339887440e-3f));
  p = fma(p, f, set1(9.618437358e-3f));
  p = fma(p, f, set1(5.550332471e-2f));
  p = fma(p, f, set1(2.402264791e-1f));
  p = fma(p, f, set1(6.931472029e-1f));
  p = fma(p, f, set1(1.0f));
  return times_power_of_2(p, n);
}

PD_INLINE V silu(V x) { return x / (1.0f + exp2(x * -1.44269504f)); }

// Calls f with the element type that `bf16` says. Where bf16 has instructions of its own, float32 is another level's.
template <class F>
PD_INLINE void with_element(int bf16, F&& f) {
  if (bf16) return f(BF16{});
#if defined(__AVX512BF16__)
  std::abort();
#else
  f(F32{});
#endif
}

}  // namespace pd
