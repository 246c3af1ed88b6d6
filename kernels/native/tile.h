// The register tile of every matrix product here.
//
// Each output element is one accumulator that walks the inner dimension from first to last, so its bits depend neither on
// the tile's height nor on where the rows were cut into tiles: a token's result is the same alone and in any batch.
#pragma once

#include <type_traits>

#include "simd.h"

namespace pd {

// A tile's accumulators, a row of b and one element of a fill the registers: 14 x 2 + 3 of AVX-512's 32, 6 x 2 + 3 of
// AVX2's 16, 6 x 4 + 5 of NEON's 32, 3 x 4 and b from memory with SSE2's 16. A lower tile is wider, to hide the latency.
#if defined(__AVX512F__)
constexpr int kTileRows = 14, kTileVecs = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 3, kTileVecs = 4;
#endif

struct Tile {
  const uint32_t* a;  // rows of dwords, `lda` apart; for an element type with halves, of two floats for each dword of b
  int64_t lda;
  const uint32_t* b;  // [depth, ldb] dwords
  int64_t ldb;
  int64_t depth;  // inner dimension in dwords
};

constexpr int64_t kAhead = 16;  // rows of b to prefetch where it streams from memory

// acc[i][j] += sum over d of a[i][d] * b[d][kLanes j ..]
template <class E, bool STREAM = false, int ROWS, int VECS>
PD_INLINE void multiply(const Tile& t, V (&acc)[ROWS][VECS]) {
  constexpr int kGroups = (ROWS + 3) / 4;
  const uint32_t* group[kGroups];  // four rows share a pointer: the rest is addressing modes
  for (int g = 0; g < kGroups; ++g) group[g] = t.a + 4 * g * t.lda;
  const int64_t lda = t.lda;
  const uint32_t* b = t.b;
  for (int64_t d = 0; d < t.depth; ++d, b += t.ldb) {
    if (STREAM) {
#pragma GCC unroll 8
      for (int line = 0; line < VECS * kLanes; line += 16) __builtin_prefetch(b + kAhead * t.ldb + line, 0, 3);
    }
    if constexpr (E::kHalves) {
      const auto add_half = [&](auto half) {
        V bv[VECS];
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) bv[j] = E::template half<half.value>(load_as<I>(b + kLanes * j));
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          const V av = (V)set1(group[i / 4][(i % 4) * lda + 2 * d + half.value]);
#pragma GCC unroll 4
          for (int j = 0; j < VECS; ++j) acc[i][j] = fma(av, bv[j], acc[i][j]);
        }
      };
      add_half(std::integral_constant<int, 0>{});
      add_half(std::integral_constant<int, 1>{});
    } else {
      I bv[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) bv[j] = load_as<I>(b + kLanes * j);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const I av = set1(group[i / 4][(i % 4) * lda + d]);
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) acc[i][j] = E::dot(acc[i][j], av, bv[j]);
      }
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
