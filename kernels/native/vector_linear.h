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
      const int64_t num_floats = round_up(count_ * stride_, kLanes);
      auto* wide = static_cast<float*>(scratch((num_floats + (is_panel_widened() ? stride_ * kPanel : 0)) * sizeof(float)));
      for (int64_t i = 0; i < count_ * stride_; i += kLanes)
        store(wide + i, load(x + i, count_ * stride_ - i), count_ * stride_ - i);
      rows_ = reinterpret_cast<const uint32_t*>(wide);
      panel_ = wide + num_floats;
    }
  }

  void times(int64_t panel) const {
    const uint32_t* weight = l_.panel(panel);
    if constexpr (E::kHalves)
      if (is_panel_widened()) return times<F32>(panel, widened(weight), stride_);
    times<E>(panel, weight, l_.depth);
  }

 private:
  // A low tile is as wide as a panel, so that weights come from memory in one stream: for few rows, memory is the limit.
  // Weights with halves need registers of their own.
  static constexpr int kSums = kTileRows * kTileVecs - (E::kHalves && kLanes == 8 ? 4 : 0);
  static constexpr int kWideRows = std::max(kSums * kLanes / kPanel, 1), kFewRows = E::kHalves ? kWideRows : 4 * kWideRows;
  static constexpr int64_t kManyRows = 2 * kTileRows;

  // Many rows share the work of widening a panel's weights. The order of the sums stays.
  bool is_panel_widened() const { return count_ >= kManyRows; }

  const uint32_t* widened(const uint32_t* weight) const {
    for (int64_t d = 0; d < l_.depth; ++d)
      for (int64_t column = 0; column < kPanel; column += kLanes) {
        const I pairs = load_as<I>(weight + d * kPanel + column);
        store(panel_ + 2 * d * kPanel + column, E::template half<0>(pairs));
        store(panel_ + (2 * d + 1) * kPanel + column, E::template half<1>(pairs));
      }
    return reinterpret_cast<const uint32_t*>(panel_);
  }

  template <class Weight>
  void times(int64_t panel, const uint32_t* weight, int64_t depth) const {
    const int64_t tiles = ceil_div(count_, count_ <= kFewRows ? kWideRows : kTileRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal heights
      const int64_t row = count_ * tile / tiles, next = count_ * (tile + 1) / tiles;
      with_rows<kTileRows>(next - row, [&](auto rows) { tile_times<Weight, rows.value>(row, panel, weight, depth); });
    }
  }

  template <class Weight, int ROWS>
  void tile_times(int64_t row, int64_t panel, const uint32_t* weight, int64_t depth) const {
    constexpr int kVecs = ROWS <= kWideRows ? kPanel / kLanes : kTileVecs;
    for (int64_t column = 0; column < kPanel; column += kVecs * kLanes) {
      V acc[ROWS][kVecs] = {};
      multiply<Weight, true>(Tile{rows_ + row * stride_, stride_, weight + column, kPanel, depth}, acc);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) Epilogue::store(l_, begin_ + row + i, panel, column, acc[i]);
    }
  }

  const Linear& l_;
  const int64_t begin_, count_, stride_;
  const uint32_t* rows_;
  float* panel_ = nullptr;  // [2 depth, kPanel], where the panel is widened
};

}  // namespace pd
