// The vector operations in AVX-512.
#pragma once

#include <immintrin.h>

namespace pd {

inline __mmask16 lanes(int64_t n) {
  return n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

PD_INLINE V load(const float* p, int64_t n) { return (V)_mm512_maskz_loadu_ps(lanes(n), p); }
PD_INLINE void store(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)v); }
PD_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
PD_INLINE V max(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
PD_INLINE V min(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
PD_INLINE V round(V x) {
  return (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PD_INLINE V times_power_of_2(V x, V n) { return (V)_mm512_scalef_ps((__m512)x, (__m512)n); }
PD_INLINE float reduce_add(V v) { return _mm512_reduce_add_ps((__m512)v); }
PD_INLINE float reduce_max(V v) { return _mm512_reduce_max_ps((__m512)v); }

// v in lanes [begin, end), `other` elsewhere.
PD_INLINE V select(int64_t begin, int64_t end, V v, V other) {
  return (V)_mm512_mask_mov_ps((__m512)other, lanes(end) & ~lanes(begin), (__m512)v);
}

// The index of the first lane equal to x, kLanes where none is.
PD_INLINE int find(V v, V x) {
  const __mmask16 hit = _mm512_cmp_ps_mask((__m512)v, (__m512)x, _CMP_EQ_OQ);
  return hit ? __builtin_ctz(hit) : kLanes;
}

// low32 * high32 of each 64-bit word.
PD_INLINE W multiply_halves(W x) { return (W)_mm512_mul_epu32((__m512i)x, _mm512_srli_epi64((__m512i)x, 32)); }

// Stores past the caches to an aligned address; `stream_fence` makes such stores visible.
PD_INLINE void stream(void* p, W v) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v); }
inline void stream_fence() { _mm_sfence(); }

// Transposes a square of dwords held in kLanes registers.
PD_INLINE void transpose(I (&x)[16]) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = (__m512i)x[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = (I)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = (I)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace pd
