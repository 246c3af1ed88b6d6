// y = x W^T over packed weights (panel.h).
//
// A panel streams once through the core for each block of rows, contiguous and prefetched; the rows of a block stay in L2.
#include <algorithm>

#include "export.h"
#include "pool.h"
#if defined(PD_TILES)
#include "tile_linear.h"
#else
#include "vector_linear.h"
#endif

namespace pd {
namespace {

template <class E, class Epilogue>
void run(const Linear& l) {
  const int64_t panels = ceil_div(l.out_features, Epilogue::kOutputs);
  const int64_t block = rows_per_block(l.depth);
  const int64_t row_blocks = ceil_div(l.rows, block);
  const int64_t tasks_wanted = num_threads() > 1 ? 8 * num_threads() : 1;
  const int64_t group = std::clamp<int64_t>(panels * row_blocks / tasks_wanted, 1, panels);
  const int64_t groups = ceil_div(panels, group);
  parallel_for(row_blocks * groups, [&](int64_t task) {
    const int64_t row = task / groups * block, panel = task % groups * group;
    RowBlock<E, Epilogue> rows(l, row, std::min(row + block, l.rows));
    for (int64_t p = panel; p < std::min(panel + group, panels); ++p) rows.times(p);
  });
}

// The weights of one column of a panel, null where there is none.
const uint32_t* source(const uint32_t* weight, const uint32_t* up, int64_t out_features, int64_t depth, int64_t panel,
                       int64_t column) {
  const int64_t feature = up ? (panel * kPanel + column) / (2 * kUnit) * kUnit + column % kUnit : panel * kPanel + column;
  if (feature >= out_features) return nullptr;
  return (up && column / kUnit % 2 ? up : weight) + feature * depth;
}

}  // namespace
}  // namespace pd

// weight [out_features, depth] dwords -> panels; with `up` of the same shape, gated panels.
extern "C" void PD_EXPORT(pack_linear)(const uint32_t* weight, const uint32_t* up, int64_t out_features, int64_t depth,
                                       uint32_t* out) {
  using namespace pd;
  const int64_t padded = round_up(depth, kDepthTile);
  parallel_for(ceil_div(out_features, up ? kPanel / 2 : kPanel), [&](int64_t panel) {
    uint32_t* to = out + panel * padded * kPanel;
    for (int64_t column = 0; column < kPanel; column += kLanes)
      for (int64_t d = 0; d < padded; d += kLanes) {
        I r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const uint32_t* from = source(weight, up, out_features, depth, panel, column + i);
          r[i] = from ? load_dwords(from + d, depth - d) : I{};
        }
        transpose(r);
        for (int i = 0; i < kLanes; ++i) store_as(to + (d + i) * kPanel + column, r[i]);
      }
  });
}

extern "C" void PD_EXPORT(linear)(int bf16, int out_bf16, int gated, const void* x, const void* weight, const float* bias,
                                  void* out, int64_t rows, int64_t depth, int64_t out_features) {
  using namespace pd;
  const Linear l{x, weight, bias, out, rows, depth, out_features};
  with_element(bf16, [&](auto element) {
    using T = typename decltype(element)::T;
    using E = std::conditional_t<std::is_same_v<T, float>, F32, BF16Pairs>;
    if (gated)
      run<E, Gated<T>>(l);
    else if (out_bf16)
      run<E, Plain<T>>(l);
    else
      run<E, Plain<float>>(l);
  });
}
