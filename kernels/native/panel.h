// The one layout of packed weights, for every instruction set, and what becomes of a product's sums.
//
// A panel holds 32 output features: [panel][depth][32] dwords, its depth padded with zeros to whole tiles of 16. In a gated
// panel eight gate features and the up features of the same eight outputs alternate, so that the vectors of every width
// hold gates and ups apart.
#pragma once

#include "simd.h"

namespace pd {

constexpr int kPanel = 32;
constexpr int kDepthTile = 16;
constexpr int kUnit = 8;  // gates, then as many ups

struct Linear {
  const void* x;       // [rows, depth] dwords
  const void* weight;  // packed
  const float* bias;   // [panels * 32] or null
  void* out;           // [rows, out_features]
  int64_t rows, depth, out_features;

  const uint32_t* panel(int64_t index) const {
    return static_cast<const uint32_t*>(weight) + index * round_up(depth, kDepthTile) * kPanel;
  }
};

// Plain outputs, of type T: `store` writes the sums of one row for VECS vectors of a panel's columns from `column` on.
template <class T>
struct Plain {
  static constexpr int kOutputs = kPanel;  // of a panel
  template <int VECS>
  static PD_INLINE void store(const Linear& l, int64_t row, int64_t panel, int64_t column, V (&sums)[VECS]) {
    const int64_t feature = panel * kPanel + column;
    T* out = static_cast<T*>(l.out) + row * l.out_features + feature;
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      const V bias = l.bias ? load(l.bias + feature + j * kLanes) : V{};
      pd::store(out + j * kLanes, sums[j] + bias, l.out_features - feature - j * kLanes);
    }
  }
};

// silu(gate) * up.
template <class T>
struct Gated {
  static constexpr int kOutputs = kPanel / 2;
  template <int VECS>
  static PD_INLINE void store(const Linear& l, int64_t row, int64_t panel, int64_t column, V (&sums)[VECS]) {
    const int64_t feature = panel * kOutputs + column / 2;
    T* out = static_cast<T*>(l.out) + row * l.out_features + feature;
    const auto write = [&](V gate, V up, int64_t at) {
      pd::store(out + at, silu(gate) * up, l.out_features - feature - at);
    };
#if defined(__AVX512F__)
#pragma GCC unroll 2
    for (int j = 0; j < VECS; j += 2) {
      const __m512 a = (__m512)sums[j], b = (__m512)sums[j + 1];
      write((V)_mm512_shuffle_f32x4(a, b, 0x44), (V)_mm512_shuffle_f32x4(a, b, 0xee), j / 2 * kLanes);
    }
#else
    constexpr int kHalf = kUnit / kLanes;
#pragma GCC unroll 8
    for (int j = 0; j < VECS / 2; ++j) {
      const int unit = j / kHalf, gate = unit * 2 * kHalf + j % kHalf;
      write(sums[gate], sums[gate + kHalf], j * kLanes);
    }
#endif
  }
};

}  // namespace pd
