// Copies between the paged cache and flat memory. These run beside the model, on a transfer's own thread, so they
// use one thread.
//
// Cache: [layers, 2, blocks, heads, block_size, row] bytes; wire: [layers, 2, heads, tokens, row] bytes.
#include <algorithm>
#include <cstring>

#include "pool.h"

namespace {

// Calls f(cache offset, wire offset, bytes) for every run of tokens that is contiguous on both sides.
template <class F>
void for_runs(int64_t planes, int64_t num_blocks, int64_t heads, int64_t block_size, int64_t row, const int64_t* block_ids,
              int64_t token_start, int64_t token_end, F&& f) {
  int64_t wire = 0;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t token = token_start; token < token_end;) {
        const int64_t run = std::min(token_end - token, block_size - token % block_size);
        const int64_t block = plane * num_blocks + block_ids[token / block_size];
        f(((block * heads + head) * block_size + token % block_size) * row, wire, run * row);
        token += run;
        wire += run * row;
      }
}

}  // namespace

extern "C" void pd_gather_tokens(const char* cache, char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                 int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                 int64_t token_end) {
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t bytes) { std::memcpy(wire + on_wire, cache + in_cache, bytes); });
}

extern "C" void pd_scatter_tokens(char* cache, const char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                  int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                  int64_t token_end) {
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t bytes) { std::memcpy(cache + in_cache, wire + on_wire, bytes); });
}

// pairs: (source, destination) blocks, copied in order in every plane.
extern "C" void pd_copy_blocks(char* cache, int64_t planes, int64_t num_blocks, int64_t block_bytes, const int64_t* pairs,
                               int64_t num_pairs) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    char* base = cache + plane * num_blocks * block_bytes;
    for (int64_t i = 0; i < num_pairs; ++i)
      std::memmove(base + pairs[2 * i + 1] * block_bytes, base + pairs[2 * i] * block_bytes, block_bytes);
  }
}
