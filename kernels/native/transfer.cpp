// Copies between the paged cache and flat memory. These run beside the model, on a transfer's own thread, so they
// use one thread.
//
// Cache: [layers, 2, blocks, heads, block_size, row] bytes; wire: [layers, 2, heads, tokens, row] bytes.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kLongRun = 4096;  // from here on the C library's copy lets the processor write lines without fetching them

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

// Copies a run; while a short one is copied, memory is asked for the next, which the hardware cannot foresee.
void copy_prefetching(char* to, const char* from, int64_t bytes, const char* next) {
  int64_t i = 0;
  for (; bytes < kLongRun && i + 4 * kLine <= bytes; i += 4 * kLine) {
    for (int64_t line = 0; line < 4; ++line) _mm_prefetch(next + i + line * kLine, _MM_HINT_T0);
    __m512i lines[4];
    for (int64_t line = 0; line < 4; ++line) lines[line] = _mm512_loadu_si512(from + i + line * kLine);
    for (int64_t line = 0; line < 4; ++line) _mm512_storeu_si512(to + i + line * kLine, lines[line]);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

// Copies a run past the caches: the cache's blocks are read much later, and whole lines need not be fetched to be written.
void copy_streaming(char* to, const char* from, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  std::memcpy(to + i, from + i, bytes - i);
}

}  // namespace

extern "C" void pd_gather_tokens(const char* cache, char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                 int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                 int64_t token_end) {
  const char* from = cache;
  char* to = wire;
  int64_t bytes = 0;
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t num_bytes) {
             copy_prefetching(to, from, bytes, cache + in_cache);
             from = cache + in_cache, to = wire + on_wire, bytes = num_bytes;
           });
  std::memcpy(to, from, bytes);
}

extern "C" void pd_scatter_tokens(char* cache, const char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                  int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                  int64_t token_end) {
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t bytes) { copy_streaming(cache + in_cache, wire + on_wire, bytes); });
  _mm_sfence();  // streamed stores become visible before what says that they are done
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
