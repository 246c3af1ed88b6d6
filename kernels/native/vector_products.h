// Attention's two products over packed keys and values, in vector registers.
#pragma once

#include <algorithm>

#include "keys.h"
#include "tile.h"

namespace pd {

struct Tiles {};  // vector registers need no set-up

constexpr int kProductRows = kTileRows;
constexpr int kSlackRows = 0;
constexpr int kFewRows = std::min(4, kTileRows);  // up to here a key block is multiplied as it is read, without being packed

// Tile `tile` of nearly equal tiles begins here.
inline int64_t product_row(int64_t tile, int64_t tiles, int64_t rows) { return rows * tile / tiles; }

constexpr int few_vecs(int rows) { return kLanes == 16 || rows <= 2 ? 4 : 2; }

// Few rows need more columns to hide the multiplier's latency.
constexpr int product_vecs(int rows) { return 2 * rows <= kTileRows ? 2 * kTileVecs : kTileVecs; }

// scores[i][k] = queries[i] . key k, for 64 keys [depth, 64].
template <class E>
inline void score(Tiles&, const uint32_t* queries, int64_t stride, int64_t depth, const uint32_t* keys, int64_t num_rows,
                  float* scores) {
  with_rows<kTileRows>(num_rows, [&](auto rows) {
    constexpr int kRows = rows.value, kVecs = product_vecs(kRows);
    for (int64_t k = 0; k < kKeys; k += kVecs * kLanes) {
      V acc[kRows][kVecs] = {};
      multiply<E>(Tile{queries, stride, keys + k, kKeys, depth}, acc);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVecs; ++j) store(scores + i * kKeys + k + j * kLanes, acc[i][j]);
    }
  });
}

template <class E, int ROWS, int VECS>
PD_INLINE void add_value_columns(const uint32_t* weights, const uint32_t* values, int64_t dim, float* out) {
  V acc[ROWS][VECS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) acc[i][j] = load(out + i * dim + j * kLanes);
  multiply<E>(Tile{weights, kKeys / E::kPerDword, values, dim, kKeys / E::kPerDword}, acc);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECS; ++j) store(out + i * dim + j * kLanes, acc[i][j]);
}

// out[i] += weights[i] . values, for 64 keys; rows of `out` and `values` are `dim` apart.
template <class E>
inline void add_values(Tiles&, const uint32_t* weights, const uint32_t* values, int64_t num_rows, int64_t dim,
                       float* out) {
  with_rows<kTileRows>(num_rows, [&](auto rows) {
    constexpr int kRows = rows.value, kVecs = product_vecs(kRows);
    int64_t d = 0;
    for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes) add_value_columns<E, kRows, kVecs>(weights, values + d, dim, out + d);
    if (d < dim) add_value_columns<E, kRows, 32 / kLanes < kVecs ? 32 / kLanes : kVecs>(weights, values + d, dim, out + d);
  });
}

}  // namespace pd
