// The vector operations in AVX2 and FMA.
#pragma once

#include <immintrin.h>

namespace pd {

PD_INLINE __m256i counted() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

// All bits set in the first n lanes, n clipped to 0..8.
PD_INLINE __m256i lanes(int64_t n) {
  const int clipped = static_cast<int>(n < 0 ? 0 : n > kLanes ? kLanes : n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(clipped), counted());
}

PD_INLINE V load(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : (V)_mm256_maskload_ps(p, lanes(n));
}
PD_INLINE void store(float* p, V v, int64_t n) {
  n >= kLanes ? store(p, v) : _mm256_maskstore_ps(p, lanes(n), (__m256)v);
}
PD_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PD_INLINE V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
PD_INLINE V min(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
PD_INLINE V round(V x) { return (V)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x * 2^n in two steps, for whole n in -252..254: one power may be no float32, each half is.
PD_INLINE V times_power_of_2(V x, V n) {
  const __m256i whole = _mm256_cvtps_epi32((__m256)n), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i k) {
    return (V)_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23);
  };
  return x * power(half) * power(_mm256_sub_epi32(whole, half));
}

PD_INLINE float reduce_add(V v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
PD_INLINE float reduce_max(V v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// v in lanes [begin, end), `other` elsewhere.
PD_INLINE V select(int64_t begin, int64_t end, V v, V other) {
  return (V)_mm256_blendv_ps((__m256)other, (__m256)v, (__m256)_mm256_andnot_si256(lanes(begin), lanes(end)));
}

// The index of the first lane equal to x, kLanes where none is.
PD_INLINE int find(V v, V x) {
  const int hit = _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)x, _CMP_EQ_OQ));
  return hit ? __builtin_ctz(hit) : kLanes;
}

// low32 * high32 of each 64-bit word.
PD_INLINE W multiply_halves(W x) { return (W)_mm256_mul_epu32((__m256i)x, _mm256_srli_epi64((__m256i)x, 32)); }

// Stores past the caches to an aligned address; `stream_fence` makes such stores visible.
PD_INLINE void stream(void* p, W v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
inline void stream_fence() { _mm_sfence(); }

// Transposes a square of dwords held in kLanes registers.
PD_INLINE void transpose(I (&x)[8]) {
  __m256i t[8], r[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32((__m256i)x[2 * i], (__m256i)x[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)x[2 * i], (__m256i)x[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = (I)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    x[i + 4] = (I)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
}

}  // namespace pd
