// The register tile of every matrix product here.
//
// Each output element is one accumulator that walks the inner dimension from first to last, so its bits depend neither on
// the tile's height nor on where the rows were cut into tiles: a token's result is the same alone and in any batch.
#pragma once

#include <type_traits>

#include "simd.h"

namespace pd {

constexpr int kTileRows = 14;  // 14 x 2 accumulators, 2 loads of B, 1 broadcast of A: 31 of 32 registers

struct Tile {
  const uint32_t* a;  // rows of dwords, `lda` apart
  int64_t lda;
  const uint32_t* b;  // [depth, ldb] dwords
  int64_t ldb;
  int64_t depth;  // inner dimension in dwords
};

constexpr int64_t kAhead = 16;  // rows of b to prefetch where it streams from memory

// acc[i][j] += sum over d of a[i][d] * b[d][16 j ..]
template <class E, bool STREAM = false, int ROWS, int VECS>
inline __attribute__((always_inline)) void multiply(const Tile& t, __m512 (&acc)[ROWS][VECS]) {
  constexpr int kGroups = (ROWS + 3) / 4;
  const uint32_t* group[kGroups];  // four rows share a pointer: the rest is addressing modes
  for (int g = 0; g < kGroups; ++g) group[g] = t.a + 4 * g * t.lda;
  const int64_t lda = t.lda;
  const uint32_t* b = t.b;
  for (int64_t d = 0; d < t.depth; ++d, b += t.ldb) {
    __m512i bv[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) bv[j] = _mm512_loadu_si512(b + kLanes * j);
    if (STREAM) {
      _mm_prefetch(reinterpret_cast<const char*>(b + kAhead * t.ldb), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(b + kAhead * t.ldb + 16), _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      __m512i av = _mm512_set1_epi32(static_cast<int>(group[i / 4][(i % 4) * lda + d]));
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] = E::dot(acc[i][j], av, bv[j]);
    }
  }
}

// Calls f(std::integral_constant<int, rows>) for a run-time 1 <= rows <= MAX.
template <int MAX, class F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (MAX > 0) {
    if (rows == MAX)
      f(std::integral_constant<int, MAX>{});
    else
      with_rows<MAX - 1>(rows, f);
  }
}

}  // namespace pd
