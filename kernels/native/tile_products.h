// Attention's two products over packed keys and values, in tiles.
//
// Every row goes through tiles, also a single one: the same sums in the same order in prefill and in decode.
#pragma once

#include "keys.h"
#include "tiles.h"

namespace pd {

constexpr int kProductRows = kTileSide;
constexpr int kFewRows = 0;
constexpr int kSlackRows = kTileSide;  // that the last tile of some rows may read and write behind them

constexpr int few_vecs(int) { return 4; }

// Tile `tile` begins here: all but the last are full, so that only rows of the slack are nobody's.
inline int64_t product_row(int64_t tile, int64_t, int64_t rows) { return std::min(tile * kTileSide, rows); }

// scores[i][k] = queries[i] . key k, for 64 keys [depth, 64]; 16 rows, whatever their number.
template <class E>
inline void score(Tiles& tiles, const uint32_t* queries, int64_t stride, int64_t depth, const uint32_t* keys, int64_t,
                  float* scores) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t d = 0; d < depth; d += kTileSide) {
    const uint32_t* b = keys + d * kKeys;
    tiles.load<4>(queries + d, stride * 4);
    tiles.load<5>(b, kKeys * 4);
    tiles.multiply<0, 4, 5>();
    tiles.load<6>(b + 16, kKeys * 4);
    tiles.multiply<1, 4, 6>();
    tiles.load<5>(b + 32, kKeys * 4);
    tiles.multiply<2, 4, 5>();
    tiles.load<6>(b + 48, kKeys * 4);
    tiles.multiply<3, 4, 6>();
  }
  tiles.store<0>(scores, kKeys * 4);
  tiles.store<1>(scores + 16, kKeys * 4);
  tiles.store<2>(scores + 32, kKeys * 4);
  tiles.store<3>(scores + 48, kKeys * 4);
}

// out[i] += weights[i] . values, for 64 keys; 16 rows, `dim` apart as those of `values`.
template <class E>
inline void add_values(Tiles& tiles, const uint32_t* weights, const uint32_t* values, int64_t, int64_t dim, float* out) {
  static_assert(kKeys / 2 == 2 * kTileSide, "the keys of a block are two tiles deep");
  tiles.load<4>(weights, kKeys * 2);
  tiles.load<5>(weights + kTileSide, kKeys * 2);
  for (int64_t d = 0; d < dim; d += kTileSide) {
    tiles.load<0>(out + d, dim * 4);
    tiles.load<6>(values + d, dim * 4);
    tiles.multiply<0, 4, 6>();
    tiles.load<7>(values + kTileSide * dim + d, dim * 4);
    tiles.multiply<0, 5, 7>();
    tiles.store<0>(out + d, dim * 4);
  }
}

}  // namespace pd
