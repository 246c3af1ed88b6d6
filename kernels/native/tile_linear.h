// A block of rows times a panel of weights, in tiles: two by two of them, so that each that is loaded is used twice.
//
// Sums go on in float32 from one stretch of the inner dimension to the next, so a row's bits do not depend on the blocking.
#pragma once

#include <algorithm>

#include "panel.h"
#include "pool.h"
#include "tiles.h"

namespace pd {

constexpr int64_t kRowBlockBytes = 384 * 1024;  // of activations kept in L2 beside a panel
constexpr int64_t kStretch = 256;  // dwords of depth: a panel's 32 KiB of it stay in L1 while the rows go by
constexpr int64_t kPair = 2 * kTileSide;
constexpr int64_t kAhead = 8 * 1024 / 4;  // dwords of weights to prefetch where they stream from memory

inline int64_t rows_per_block(int64_t depth) {
  return std::max<int64_t>(2, kRowBlockBytes / (depth * 4 * kPair)) * kPair;
}

template <class E, class Epilogue>
class RowBlock {
 public:
  // Rows that fill no tile, and all where the depth fills none, are copied and filled up with zeros.
  RowBlock(const Linear& l, int64_t begin, int64_t end)
      : l_(l), begin_(begin), count_(end - begin), depth_(round_up(l.depth, kDepthTile)) {
    const int64_t whole = depth_ == l.depth ? count_ / kTileSide * kTileSide : 0;
    const int64_t copied = round_up(count_ - whole, kTileSide);
    sums_ = static_cast<float*>(scratch(4 * (round_up(count_, kPair) * kPanel + copied * depth_)));
    copy_ = reinterpret_cast<uint32_t*>(sums_ + round_up(count_, kPair) * kPanel);
    first_copied_ = whole;
    std::memset(copy_, 0, copied * depth_ * 4);
    for (int64_t r = whole; r < count_; ++r) std::memcpy(copy_ + (r - whole) * depth_, row(r), l.depth * 4);
  }

  void times(int64_t panel) {
    for (int64_t d = 0; d < depth_; d += kStretch)
      for (int64_t r = 0; r < count_; r += kPair)
        count_ - r > kTileSide ? multiply<2>(r, d, panel) : multiply<1>(r, d, panel);
    for (int64_t r = 0; r < count_; ++r) {
      V sums[kPanel / kLanes];
      for (int j = 0; j < kPanel / kLanes; ++j) sums[j] = load(sums_ + r * kPanel + j * kLanes);
      Epilogue::store(l_, begin_ + r, panel, 0, sums);
    }
  }

 private:
  const uint32_t* row(int64_t r) const { return static_cast<const uint32_t*>(l_.x) + (begin_ + r) * l_.depth; }
  const uint32_t* tile_rows(int64_t r) const { return r < first_copied_ ? row(r) : copy_ + (r - first_copied_) * depth_; }

  // Sums of the 16 or 32 rows from r on += their stretch of depth from `begin` on times the panel's.
  template <int TILES>
  void multiply(int64_t r, int64_t begin, int64_t panel) {
    constexpr int64_t kSumStride = kPanel * sizeof(float);
    float* sums = sums_ + r * kPanel;
    if (begin == 0) {
      tiles_.zero<0>();
      tiles_.zero<1>();
      if (TILES == 2) tiles_.zero<2>(), tiles_.zero<3>();
    } else {
      tiles_.load<0>(sums, kSumStride);
      tiles_.load<1>(sums + kTileSide, kSumStride);
      if (TILES == 2) {
        tiles_.load<2>(sums + kTileSide * kPanel, kSumStride);
        tiles_.load<3>(sums + kTileSide * kPanel + kTileSide, kSumStride);
      }
    }
    const int64_t row_bytes = 4 * depth_;  // of a copied row, and of an own one, whose depth fills tiles
    const uint32_t* weight = l_.panel(panel);
    for (int64_t d = begin; d < std::min(begin + kStretch, depth_); d += kDepthTile) {
      const uint32_t* b = weight + d * kPanel;
      if (r == 0)  // later rows find the stretch in L1
        for (int line = 0; line < kDepthTile * kPanel; line += 16) __builtin_prefetch(b + kAhead + line, 0, 3);
      tiles_.load<6>(b, kPanel * 4);
      tiles_.load<7>(b + kTileSide, kPanel * 4);
      tiles_.load<4>(tile_rows(r) + d, row_bytes);
      tiles_.multiply<0, 4, 6>();
      tiles_.multiply<1, 4, 7>();
      if (TILES == 2) {
        tiles_.load<5>(tile_rows(r + kTileSide) + d, row_bytes);
        tiles_.multiply<2, 5, 6>();
        tiles_.multiply<3, 5, 7>();
      }
    }
    tiles_.store<0>(sums, kSumStride);
    tiles_.store<1>(sums + kTileSide, kSumStride);
    if (TILES == 2) {
      tiles_.store<2>(sums + kTileSide * kPanel, kSumStride);
      tiles_.store<3>(sums + kTileSide * kPanel + kTileSide, kSumStride);
    }
  }

  const Linear& l_;
  const int64_t begin_, count_, depth_;
  int64_t first_copied_;
  float* sums_;     // [count, 32]
  uint32_t* copy_;  // rows from first_copied_ on, [.., depth]
  Tiles tiles_;
};

}  // namespace pd
