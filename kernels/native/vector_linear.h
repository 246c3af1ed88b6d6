// A block of rows times a panel of weights, in vector registers.
#pragma once

#include <algorithm>

#include "panel.h"
#include "pool.h"
#include "tile.h"

namespace pd {

constexpr int64_t kRowBlockBytes = 384 * 1024;  // of activations kept in L2 beside a panel

inline int64_t rows_per_block(int64_t depth) {
  return std::max<int64_t>(4, kRowBlockBytes / (depth * 4 * kTileRows)) * kTileRows;
}

template <class E, class Epilogue>
class RowBlock {
 public:
  // Rows whose weights have halves are widened once, so that a product only widens the weights.
  RowBlock(const Linear& l, int64_t begin, int64_t end)
      : l_(l), begin_(begin), count_(end - begin), stride_(E::kHalves ? 2 * l.depth : l.depth) {
    rows_ = static_cast<const uint32_t*>(l.x) + begin * l.depth;
    if constexpr (E::kHalves) {
      const auto* x = reinterpret_cast<const uint16_t*>(rows_);
      auto* wide = static_cast<float*>(scratch(count_ * stride_ * sizeof(float)));
      for (int64_t i = 0; i < count_ * stride_; i += kLanes)
        store(wide + i, load(x + i, count_ * stride_ - i), count_ * stride_ - i);
      rows_ = reinterpret_cast<const uint32_t*>(wide);
    }
  }

  void times(int64_t panel) const {
    const int64_t tiles = ceil_div(count_, count_ <= kFewRows ? kWideRows : kTileRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal heights
      const int64_t row = count_ * tile / tiles, next = count_ * (tile + 1) / tiles;
      with_rows<kTileRows>(next - row, [&](auto rows) { tile_times<rows.value>(row, panel); });
    }
  }

 private:
  // A low tile is as wide as a panel, so that weights come from memory in one stream: for few rows, memory is the limit.
  // Weights with halves need registers of their own.
  static constexpr int kSums = kTileRows * kTileVecs - (E::kHalves && kLanes == 8 ? 4 : 0);
  static constexpr int kWideRows = std::max(kSums * kLanes / kPanel, 1), kFewRows = E::kHalves ? kWideRows : 4 * kWideRows;

  template <int ROWS>
  void tile_times(int64_t row, int64_t panel) const {
    constexpr int kVecs = ROWS <= kWideRows ? kPanel / kLanes : kTileVecs;
    for (int64_t column = 0; column < kPanel; column += kVecs * kLanes) {
      V acc[ROWS][kVecs] = {};
      const uint32_t* weight = l_.panel(panel) + column;
      multiply<E, true>(Tile{rows_ + row * stride_, stride_, weight, kPanel, l_.depth}, acc);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) Epilogue::store(l_, begin_ + row + i, panel, column, acc[i]);
    }
  }

  const Linear& l_;
  const int64_t begin_, count_, stride_;
  const uint32_t* rows_;
};

}  // namespace pd
