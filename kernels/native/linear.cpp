// y = x W^T over weights packed once into panels of 32 output features: [panel][depth][32] dwords.
//
// A panel streams once through the core for each block of rows, contiguous and prefetched; the rows of a block stay in L2.
// In a gated panel columns 0..15 are gate features and 16..31 the up features of the same 16 outputs.
#include <algorithm>

#include "pool.h"
#include "tile.h"

namespace pd {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int64_t kRowBlockBytes = 384 * 1024;  // of activations kept in L2 beside a panel

struct Linear {
  const void* x;        // [rows, depth] dwords
  const void* weight;   // packed
  const float* bias;    // [panels * 32] or null
  void* out;            // [rows, out_features]
  int64_t rows, depth, out_features;
};

// Writes one tile's accumulators: plain outputs of 32 columns in `Out`.
template <class Out>
struct Plain {
  static constexpr int kColumns = kPanel;
  template <int ROWS>
  static void store(const Linear& l, int64_t row, int64_t panel, __m512 (&acc)[ROWS][2]) {
    auto* out = static_cast<typename Out::T*>(l.out) + row * l.out_features + panel * kColumns;
    const int64_t left = l.out_features - panel * kColumns;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512 bias = l.bias ? _mm512_loadu_ps(l.bias + panel * kPanel + j * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
        Out::store(out + i * l.out_features + j * kLanes, _mm512_add_ps(acc[i][j], bias), lanes(left - j * kLanes));
    }
  }
};

// silu(gate) * up.
template <class Out>
struct Gated {
  static constexpr int kColumns = kLanes;
  template <int ROWS>
  static void store(const Linear& l, int64_t row, int64_t panel, __m512 (&acc)[ROWS][2]) {
    auto* out = static_cast<typename Out::T*>(l.out) + row * l.out_features + panel * kColumns;
    const __mmask16 mask = lanes(l.out_features - panel * kColumns);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
      Out::store(out + i * l.out_features, _mm512_mul_ps(silu(acc[i][0]), acc[i][1]), mask);
  }
};

template <class E, class Epilogue>
void panel_times_rows(const Linear& l, int64_t row_begin, int64_t row_end, int64_t panel) {
  const auto* x = static_cast<const uint32_t*>(l.x);
  const auto* weight = static_cast<const uint32_t*>(l.weight) + panel * l.depth * kPanel;
  const int64_t num_tiles = ceil_div(row_end - row_begin, kTileRows);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {  // of nearly equal heights
    const int64_t row = row_begin + (row_end - row_begin) * tile / num_tiles;
    const int64_t next = row_begin + (row_end - row_begin) * (tile + 1) / num_tiles;
    with_rows<kTileRows>(next - row, [&](auto rows) {
      __m512 acc[rows.value][2];
      for (auto& r : acc) r[0] = r[1] = _mm512_setzero_ps();
      multiply<E, true>(Tile{x + row * l.depth, l.depth, weight, kPanel, l.depth}, acc);
      Epilogue::template store<rows.value>(l, row, panel, acc);
    });
  }
}

template <class E, class Epilogue>
void run(const Linear& l) {
  const int64_t panels = ceil_div(l.out_features, Epilogue::kColumns);
  const int64_t block = std::max<int64_t>(4, kRowBlockBytes / (l.depth * 4 * kTileRows)) * kTileRows;
  const int64_t row_blocks = ceil_div(l.rows, block);
  const int64_t tasks_wanted = num_threads() > 1 ? 8 * num_threads() : 1;
  const int64_t group = std::clamp<int64_t>(panels * row_blocks / tasks_wanted, 1, panels);
  const int64_t groups = ceil_div(panels, group);
  parallel_for(row_blocks * groups, [&](int64_t task) {
    const int64_t row = task / groups * block, panel = task % groups * group;
    for (int64_t p = panel; p < std::min(panel + group, panels); ++p)
      panel_times_rows<E, Epilogue>(l, row, std::min(row + block, l.rows), p);
  });
}

// Copies rows [row, row + 16) of a [rows, depth] matrix, transposed, to 16 columns of a panel; absent rows are zero.
void pack_columns(const uint32_t* weight, int64_t rows, int64_t depth, int64_t row, uint32_t* out) {
  for (int64_t d = 0; d < depth; d += kLanes) {
    const __mmask16 mask = lanes(depth - d);
    __m512i r[16];
    for (int i = 0; i < 16; ++i)
      r[i] = row + i < rows ? _mm512_maskz_loadu_epi32(mask, weight + (row + i) * depth + d) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < std::min<int64_t>(kLanes, depth - d); ++i) _mm512_storeu_si512(out + (d + i) * kPanel, r[i]);
  }
}

}  // namespace
}  // namespace pd

// weight [out_features, depth] dwords -> ceil(out_features / 32) panels; with `up` of the same shape, gated panels of 16.
extern "C" void pd_pack_linear(const uint32_t* weight, const uint32_t* up, int64_t out_features, int64_t depth,
                               uint32_t* out) {
  using namespace pd;
  const int64_t columns = up ? kLanes : kPanel;
  parallel_for(ceil_div(out_features, columns), [&](int64_t panel) {
    uint32_t* to = out + panel * depth * kPanel;
    pack_columns(weight, out_features, depth, panel * columns, to);
    pack_columns(up ? up : weight, out_features, depth, up ? panel * columns : panel * columns + kLanes, to + kLanes);
  });
}

extern "C" void pd_linear(int bf16, int out_bf16, int gated, const void* x, const void* weight, const float* bias,
                          void* out, int64_t rows, int64_t depth, int64_t out_features) {
  using namespace pd;
  const Linear l{x, weight, bias, out, rows, depth, out_features};
  if (!bf16)
    gated ? run<F32, Gated<F32>>(l) : run<F32, Plain<F32>>(l);
  else if (!out_bf16)
    run<BF16, Plain<F32>>(l);
  else
    gated ? run<BF16, Gated<BF16>>(l) : run<BF16, Plain<BF16>>(l);
}
