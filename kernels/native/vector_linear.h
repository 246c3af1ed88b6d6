// A block of rows times a panel of weights, in vector registers.
#pragma once

#include <algorithm>

#include "panel.h"
#include "tile.h"

namespace pd {

constexpr int64_t kRowBlockBytes = 384 * 1024;  // of activations kept in L2 beside a panel

inline int64_t rows_per_block(int64_t depth) {
  return std::max<int64_t>(4, kRowBlockBytes / (depth * 4 * kTileRows)) * kTileRows;
}

template <class E, class Epilogue>
class RowBlock {
 public:
  RowBlock(const Linear& l, int64_t begin, int64_t end) : l_(l), begin_(begin), end_(end) {}

  void times(int64_t panel) const {
    const int64_t tiles = ceil_div(end_ - begin_, kTileRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal heights
      const int64_t row = begin_ + (end_ - begin_) * tile / tiles, next = begin_ + (end_ - begin_) * (tile + 1) / tiles;
      with_rows<kTileRows>(next - row, [&](auto rows) { tile_times<rows.value>(row, panel); });
    }
  }

 private:
  template <int ROWS>
  void tile_times(int64_t row, int64_t panel) const {
    constexpr int kVecs = std::min(2 * ROWS <= kTileRows ? 2 * kTileVecs : kTileVecs, kPanel / kLanes);
    const auto* x = static_cast<const uint32_t*>(l_.x) + row * l_.depth;
    for (int64_t column = 0; column < kPanel; column += kVecs * kLanes) {
      V acc[ROWS][kVecs] = {};
      multiply<E, true>(Tile{x, l_.depth, l_.panel(panel) + column, kPanel, l_.depth}, acc);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) Epilogue::store(l_, row + i, panel, column, acc[i]);
    }
  }

  const Linear& l_;
  const int64_t begin_, end_;
};

}  // namespace pd
