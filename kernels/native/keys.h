// Reading the cached keys and values of one block of 64 keys into the layout of the products.
//
// Everything here also prefetches the same places of the next key block, so that memory is busy all the time.
#pragma once

#include <algorithm>

#include "tile.h"

namespace pd {

constexpr int kKeys = 64;  // of one key block
constexpr int kGroup = 8;  // keys that are always neighbours: a cache block holds a multiple of 8 tokens

// The locations of up to 64 keys of a kv head.
template <class T>
struct KeyBlock {
  int64_t key = -1;  // the first one
  int64_t count = 0;
  const T *keys[kKeys / kGroup], *values[kKeys / kGroup];  // for groups without a key: any readable memory

  // Key k + i, of those that one vector holds: i is known when the loop over them is unrolled.
  PD_INLINE const T* key_at(int64_t k, int i, int64_t head_dim) const {
    const int64_t in_group = (kLanes < kGroup ? k % kGroup : 0) + i;
    return keys[k / kGroup + in_group / kGroup] + in_group % kGroup * head_dim;
  }
  PD_INLINE const T* value_at(int64_t k, int64_t head_dim) const { return values[k / kGroup] + k % kGroup * head_dim; }
};

PD_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// r[i] = operand dword d + i of keys k .. k + kLanes - 1. The values of absent keys are undefined.
template <class E>
PD_INLINE void read_keys(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                         int64_t k, int64_t d, I (&r)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int64_t at = d * E::kPerDword;
    r[i] = E::dwords(block.key_at(k, i, head_dim) + at, head_dim / E::kPerDword - d);
    prefetch(next.key_at(k, i, head_dim) + at);
  }
  transpose(r);
}

#if defined(__AVX512BF16__)

// Takes words 0, 32, 1, 33, ... of two registers: those of the first beside those of the second.
struct alignas(64) Interleave {
  uint16_t index[64];
  constexpr Interleave() : index() {
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  }
};
inline constexpr Interleave kInterleave;

#endif

// v = operands [d, d + kLanes VECS) of the values of keys kPerDword k and, where a dword holds two, its neighbour; zero
// where there is no key or no lane.
template <class E, int VECS>
PD_INLINE void read_values(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                           int64_t k, int64_t d, I (&v)[VECS]) {
  if constexpr (E::kPerDword == 1) {
    const auto* from = block.value_at(k, head_dim);
    const auto* ahead = next.value_at(k, head_dim);
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j, d += kLanes) {
      v[j] = E::dwords(from + d, k < block.count ? head_dim - d : 0);
      prefetch(ahead + d);
    }
  } else {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_load_si512(kInterleave.index), high = _mm512_load_si512(kInterleave.index + 32);
    const uint16_t *from = block.value_at(2 * k, head_dim), *ahead = next.value_at(2 * k, head_dim);
#pragma GCC unroll 2
    for (int j = 0; j < VECS; j += 2, d += 2 * kLanes) {
      const __mmask32 mask = lanes(head_dim - d) | static_cast<__mmask32>(lanes(head_dim - d - kLanes)) << kLanes;
      const __m512i even = _mm512_maskz_loadu_epi16(2 * k < block.count ? mask : 0, from + d);
      const __m512i odd = _mm512_maskz_loadu_epi16(2 * k + 1 < block.count ? mask : 0, from + head_dim + d);
      prefetch(ahead + d);
      prefetch(ahead + head_dim + d);
      v[j] = (I)_mm512_permutex2var_epi16(even, low, odd);
      v[j + 1] = (I)_mm512_permutex2var_epi16(even, high, odd);
    }
#endif
  }
}

// out = [depth, 64 keys] dwords; a depth that is no multiple of the lanes is filled up with zeros.
template <class E>
inline void pack_keys(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                      uint32_t* out) {
  for (int64_t d = 0; d < head_dim / E::kPerDword; d += kLanes)
    for (int64_t k = 0; k < kKeys; k += kLanes) {
      I r[kLanes];
      read_keys<E>(block, next, head_dim, k, d, r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_as(out + (d + i) * kKeys + k, r[i]);
    }
}

// out = [64 keys / (1 or 2 a dword), dim] dwords.
template <class E>
inline void pack_values(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                        int64_t dim, uint32_t* out) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes)
    for (int64_t k = 0; k < kKeys / E::kPerDword; ++k) {
      I v[2];
      read_values<E>(block, next, head_dim, k, d, v);
      store_as(out + k * dim + d, v[0]);
      store_as(out + k * dim + d + kLanes, v[1]);
    }
}

// The two products of attention for few rows, the same sums in the same order as `multiply` over packed keys and values.

// scores[i][k] = queries[i] . key k; query rows are `stride` dwords apart and zero past head_dim.
template <class E, int ROWS>
inline void score_unpacked(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                           const uint32_t* queries, int64_t stride, float* scores) {
  for (int64_t k = 0; k < kKeys; k += kLanes) {
    V acc[ROWS] = {};
    for (int64_t d = 0; d < head_dim / E::kPerDword; d += kLanes) {
      I r[kLanes];
      read_keys<E>(block, next, head_dim, k, d, r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) acc[row] = E::dot(acc[row], set1(queries[row * stride + d + i]), r[i]);
    }
    for (int row = 0; row < ROWS; ++row) store(scores + row * kKeys + k, acc[row]);
  }
}

// out[i] += weights[i] . values, for lanes [d, d + kLanes VECS); rows of `out` are `dim` apart.
template <class E, int ROWS, int VECS>
inline void add_values_unpacked(const KeyBlock<typename E::T>& block, const KeyBlock<typename E::T>& next, int64_t head_dim,
                                int64_t d, const uint32_t* weights, float* out, int64_t dim) {
  constexpr int kDepth = kKeys / E::kPerDword;
  V acc[ROWS][VECS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) acc[i][j] = load(out + i * dim + j * kLanes);
  for (int k = 0; k < kDepth; ++k) {
    I v[VECS];
    read_values<E>(block, next, head_dim, k, d, v);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const I weight = set1(weights[i * kDepth + k]);
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) acc[i][j] = E::dot(acc[i][j], weight, v[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) store(out + i * dim + j * kLanes, acc[i][j]);
}

}  // namespace pd
