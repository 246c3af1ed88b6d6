// Reading the cached keys and values of one block of 64 keys into the layout of the products.
//
// Everything here also prefetches the same places of the next key block, so that memory is busy all the time.
#pragma once

#include <algorithm>

#include "tile.h"

namespace pd {

// These run inside loops that keep their sums in registers, which a call would spill.
#define PD_INLINE inline __attribute__((always_inline))

constexpr int kKeys = 64;  // of one key block

// The locations of up to 64 keys of a kv head, eight by eight: a cache block holds a multiple of 8 tokens.
template <class T>
struct KeyBlock {
  int64_t key = -1;  // the first one
  int64_t count = 0;
  const T *keys[kKeys / 8], *values[kKeys / 8];  // for groups without a key: any readable memory
};

// r[i] = dwords [d, d + 16) of keys k .. k + 15, one dword of 16 keys in each register. The values of absent
// keys are undefined.
template <class T>
PD_INLINE void read_keys(const KeyBlock<T>& block, const KeyBlock<T>& next, int64_t head_dim, int64_t k, int64_t d,
                      __m512i (&r)[16]) {
  constexpr int64_t kPer = 4 / sizeof(T);
  const __mmask16 mask = lanes(head_dim / kPer - d);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t at = i % 8 * head_dim + d * kPer;
    r[i] = _mm512_maskz_loadu_epi32(mask, block.keys[k / 8 + i / 8] + at);
    _mm_prefetch(next.keys[k / 8 + i / 8] + at, _MM_HINT_T0);
  }
  transpose16(r);
}

// Takes words 0, 32, 1, 33, ... of two registers: those of the first beside those of the second.
struct alignas(64) Interleave {
  uint16_t index[64];
  constexpr Interleave() : index() {
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  }
};
inline constexpr Interleave kInterleave;

// v = lanes [d, d + 16 VECS) of the values of key k; zero where there is no key or no lane.
template <int VECS>
PD_INLINE void read_values(const KeyBlock<float>& block, const KeyBlock<float>& next, int64_t head_dim, int64_t k, int64_t d,
                        __m512i (&v)[VECS]) {
#pragma GCC unroll 4
  for (int j = 0; j < VECS; ++j, d += kLanes) {
    const __mmask16 mask = k < block.count ? lanes(head_dim - d) : 0;
    v[j] = _mm512_maskz_loadu_epi32(mask, block.values[k / 8] + k % 8 * head_dim + d);
    _mm_prefetch(next.values[k / 8] + k % 8 * head_dim + d, _MM_HINT_T0);
  }
}

// The same of keys 2 k and 2 k + 1, neighbours in each dword.
template <int VECS>
PD_INLINE void read_values(const KeyBlock<uint16_t>& block, const KeyBlock<uint16_t>& next, int64_t head_dim, int64_t k,
                        int64_t d, __m512i (&v)[VECS]) {
  const __m512i low = _mm512_load_si512(kInterleave.index), high = _mm512_load_si512(kInterleave.index + 32);
  const int64_t group = k / 4, row = k % 4 * 2 * head_dim;
#pragma GCC unroll 2
  for (int j = 0; j < VECS; j += 2, d += 2 * kLanes) {
    const __mmask32 mask = lanes(head_dim - d) | static_cast<__mmask32>(lanes(head_dim - d - kLanes)) << kLanes;
    const uint16_t* at = block.values[group] + row + d;
    const __m512i even = _mm512_maskz_loadu_epi16(2 * k < block.count ? mask : 0, at);
    const __m512i odd = _mm512_maskz_loadu_epi16(2 * k + 1 < block.count ? mask : 0, at + head_dim);
    _mm_prefetch(next.values[group] + row + d, _MM_HINT_T0);
    _mm_prefetch(next.values[group] + row + head_dim + d, _MM_HINT_T0);
    v[j] = _mm512_permutex2var_epi16(even, low, odd);
    v[j + 1] = _mm512_permutex2var_epi16(even, high, odd);
  }
}

// out = [head_dim dwords, 64 keys] dwords.
template <class T>
inline void pack_keys(const KeyBlock<T>& block, const KeyBlock<T>& next, int64_t head_dim, uint32_t* out) {
  const int64_t depth = head_dim * static_cast<int64_t>(sizeof(T)) / 4;
  for (int64_t d = 0; d < depth; d += kLanes)
    for (int64_t k = 0; k < kKeys; k += kLanes) {
      __m512i r[16];
      read_keys(block, next, head_dim, k, d, r);
      uint32_t* to = out + d * kKeys + k;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < depth - d) _mm512_store_si512(to + i * kKeys, r[i]);
    }
}

// out = [64 keys / (1 or 2 a dword), dim] dwords.
template <class T>
inline void pack_values(const KeyBlock<T>& block, const KeyBlock<T>& next, int64_t head_dim, int64_t dim, uint32_t* out) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes)
    for (int64_t k = 0; k < kKeys * static_cast<int64_t>(sizeof(T)) / 4; ++k) {
      __m512i v[2];
      read_values(block, next, head_dim, k, d, v);
      _mm512_store_si512(out + k * dim + d, v[0]);
      _mm512_store_si512(out + k * dim + d + kLanes, v[1]);
    }
}

// The two products of attention for few rows, the same sums in the same order as `multiply` over packed keys and values.

// scores[i][k] = queries[i] . key k; query rows are `stride` dwords apart and zero past head_dim.
template <class E, int ROWS>
inline void score_unpacked(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                           const uint32_t* queries, int64_t stride, float* scores) {
  for (int64_t k = 0; k < kKeys; k += kLanes) {
    __m512 acc[ROWS];
    for (auto& row : acc) row = _mm512_setzero_ps();
    for (int64_t d = 0; d < stride; d += kLanes) {
      __m512i r[16];
      read_keys(block, next, head_dim, k, d, r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row)
          acc[row] = E::dot(acc[row], _mm512_set1_epi32(static_cast<int>(queries[row * stride + d + i])), r[i]);
    }
    for (int row = 0; row < ROWS; ++row) _mm512_store_ps(scores + row * kKeys + k, acc[row]);
  }
}

// out[i] += weights[i] . values, for lanes [d, d + 16 VECS); rows of `out` are `dim` apart.
template <class E, int ROWS, int VECS>
inline void add_values_unpacked(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                                int64_t d, const uint32_t* weights, float* out, int64_t dim) {
  constexpr int kDepth = kKeys / E::kPerDword;
  __m512 acc[ROWS][VECS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) acc[i][j] = _mm512_loadu_ps(out + i * dim + j * kLanes);
  for (int k = 0; k < kDepth; ++k) {
    __m512i v[VECS];
    read_values(block, next, head_dim, k, d, v);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(weights[i * kDepth + k]));
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] = E::dot(acc[i][j], weight, v[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) _mm512_storeu_ps(out + i * dim + j * kLanes, acc[i][j]);
}

}  // namespace pd
