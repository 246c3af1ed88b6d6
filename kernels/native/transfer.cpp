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
constexpr int64_t kWord = 8;
constexpr int64_t kAhead = 4096;  // bytes between the copy and the prefetch
constexpr uint64_t kKeyStep = 0x9E3779B185EBCA87;

// The wire's checksum as `Kernels` defines it, eight words at a time.
class Checksum {
 public:
  // The next words added are at this offset of the wire.
  void seek(int64_t offset) {
    const __m512i lanes = _mm512_set_epi64(8 * kKeyStep, 7 * kKeyStep, 6 * kKeyStep, 5 * kKeyStep, 4 * kKeyStep, 3 * kKeyStep,
                                           2 * kKeyStep, kKeyStep);
    keys_ = _mm512_add_epi64(_mm512_set1_epi64(offset / kWord * kKeyStep), lanes);
  }

  // Lanes outside of `mask` must be zero.
  void add(__m512i words, __mmask8 mask = 0xff) {
    const __m512i mixed = _mm512_xor_si512(words, keys_);
    const __m512i product = _mm512_maskz_mul_epu32(mask, mixed, _mm512_srli_epi64(mixed, 32));
    sum_ = _mm512_add_epi64(sum_, _mm512_add_epi64(product, words));
    keys_ = _mm512_add_epi64(keys_, _mm512_set1_epi64(8 * kKeyStep));
  }

  uint64_t value() const { return _mm512_reduce_add_epi64(sum_); }

 private:
  __m512i keys_ = _mm512_setzero_si512();
  __m512i sum_ = _mm512_setzero_si512();
};

__mmask8 words_mask(int64_t bytes) { return static_cast<__mmask8>((1u << bytes / kWord) - 1); }

// Calls f(cache offset, wire offset, bytes) for every run of tokens that is contiguous on both sides. A
// block's heads come one after the other, as in the cache: memory serves one long pass over a block better
// than many short ones.
template <class F>
void for_runs(int64_t planes, int64_t num_blocks, int64_t heads, int64_t block_size, int64_t row, const int64_t* block_ids,
              int64_t token_start, int64_t token_end, F&& f) {
  const int64_t tokens = token_end - token_start;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t token = token_start; token < token_end;) {
      const int64_t run = std::min(token_end - token, block_size - token % block_size);
      const int64_t block = plane * num_blocks + block_ids[token / block_size];
      for (int64_t head = 0; head < heads; ++head)
        f(((block * heads + head) * block_size + token % block_size) * row,
          ((plane * heads + head) * tokens + token - token_start) * row, run * row);
      token += run;
    }
}

// Copies a run of whole words and checksums it, and prefetches the data that is copied soon, in this run or
// the next: blocks are anywhere, the hardware cannot predict them. The checksum is passed by value, to stay
// in registers.
Checksum copy_summing(char* to, const char* from, int64_t bytes, const char* next, Checksum checksum) {
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    _mm_prefetch((i + kAhead < bytes ? from : next - bytes) + i + kAhead, _MM_HINT_NTA);
    const __m512i words = _mm512_loadu_si512(from + i);
    _mm512_storeu_si512(to + i, words);
    checksum.add(words);
  }
  const __mmask8 mask = words_mask(bytes - i);
  const __m512i words = _mm512_maskz_loadu_epi64(mask, from + i);
  _mm512_mask_storeu_epi64(to + i, mask, words);
  checksum.add(words, mask);
  return checksum;
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

// Returns the checksum of the bytes that it wrote.
extern "C" uint64_t pd_gather_tokens(const char* cache, char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                     int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                     int64_t token_end) {
  Checksum checksum;
  const char* from = cache;
  int64_t start = 0, bytes = 0;
  const auto copy = [&](const char* next) {
    checksum.seek(start);
    checksum = copy_summing(wire + start, from, bytes, next, checksum);
  };
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t num_bytes) {
             copy(cache + in_cache);
             from = cache + in_cache, start = on_wire, bytes = num_bytes;
           });
  copy(from);
  return checksum.value();
}

extern "C" uint64_t pd_wire_checksum(const char* wire, int64_t bytes) {
  Checksum checksum;
  checksum.seek(0);
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) checksum.add(_mm512_loadu_si512(wire + i));
  const __mmask8 mask = words_mask(bytes - i);
  checksum.add(_mm512_maskz_loadu_epi64(mask, wire + i), mask);
  return checksum.value();
}

extern "C" void pd_scatter_tokens(char* cache, const char* wire, int64_t planes, int64_t num_blocks, int64_t heads,
                                  int64_t block_size, int64_t row, const int64_t* block_ids, int64_t token_start,
                                  int64_t token_end) {
  for_runs(planes, num_blocks, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t bytes) { copy_streaming(cache + in_cache, wire + on_wire, bytes); });
  _mm_sfence();  // streamed stores become visible before the signal that they are done
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
