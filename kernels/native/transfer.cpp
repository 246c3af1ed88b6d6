// Copies between the paged cache and flat memory. These run beside the model, on a transfer's own thread, so they
// use one thread.
//
// Cache: [layers, 2, blocks, heads, block_size, row] bytes; wire: [layers, 2, heads, tokens, row] bytes.
#include <algorithm>
#include <cstring>

#include "export.h"
#include "simd.h"

namespace {

using pd::W;

constexpr int64_t kLine = 64;
constexpr int64_t kWord = 8;
constexpr int64_t kAhead = 4096;  // bytes between the copy and the prefetch
constexpr uint64_t kKeyStep = 0x9E3779B185EBCA87;

constexpr int64_t kWords = sizeof(W) / kWord;  // of a vector

// The wire's checksum as `Kernels` defines it, a vector of words at a time.
class Checksum {
 public:
  // The next words added are at this offset of the wire.
  void seek(int64_t offset) {
    for (int64_t i = 0; i < kWords; ++i) keys_[i] = (offset / kWord + i + 1) * kKeyStep;
  }

  void add(W words) {
    sum_ += pd::multiply_halves(words ^ keys_) + words;
    keys_ += kWords * kKeyStep;
  }

  // The last ones, fewer than a vector of them.
  void add_last(const char* words, int64_t bytes) {
    W part{};
    std::memcpy(&part, words, bytes);
    const W mixed = part ^ keys_;
    for (int64_t i = 0; i < bytes / kWord; ++i) sum_[i] += (mixed[i] & 0xffffffffu) * (mixed[i] >> 32) + part[i];
  }

  uint64_t value() const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < kWords; ++i) sum += sum_[i];
    return sum;
  }

 private:
  W keys_{};
  W sum_{};
};

// Calls f(cache offset, wire offset, bytes) for every run of tokens that is contiguous on both sides, of the
// first `heads` of a block's `held` heads. A block's heads come one after the other, as in the cache: memory
// serves one long pass over a block better than many short ones.
template <class F>
void for_runs(int64_t planes, int64_t num_blocks, int64_t held, int64_t heads, int64_t block_size, int64_t row,
              const int64_t* block_ids, int64_t token_start, int64_t token_end, F&& f) {
  const int64_t tokens = token_end - token_start;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t token = token_start; token < token_end;) {
      const int64_t run = std::min(token_end - token, block_size - token % block_size);
      const int64_t block = plane * num_blocks + block_ids[token / block_size];
      for (int64_t head = 0; head < heads; ++head)
        f(((block * held + head) * block_size + token % block_size) * row,
          ((plane * heads + head) * tokens + token - token_start) * row, run * row);
      token += run;
    }
}

// Copies a run of whole words and checksums it, and prefetches the data that is copied soon, in this run or
// the next: blocks are anywhere, the hardware cannot predict them. The checksum is passed by value, to stay
// in registers.
Checksum copy_summing(char* to, const char* from, int64_t bytes, const char* next, Checksum checksum) {
  constexpr int64_t kStep = sizeof(W);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    __builtin_prefetch((i + kAhead < bytes ? from : next - bytes) + i + kAhead, 0, 0);
    const W words = pd::load_as<W>(from + i);
    pd::store_as(to + i, words);
    checksum.add(words);
  }
  std::memcpy(to + i, from + i, bytes - i);
  checksum.add_last(from + i, bytes - i);
  return checksum;
}

// Copies a run past the caches: the cache's blocks are read much later, and whole lines need not be fetched to be written.
void copy_streaming(char* to, const char* from, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  constexpr int64_t kStep = sizeof(W);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) pd::stream(to + i, pd::load_as<W>(from + i));
  std::memcpy(to + i, from + i, bytes - i);
}

}  // namespace

// Returns the checksum of the bytes that it wrote.
extern "C" uint64_t PD_EXPORT(gather_tokens)(const char* cache, char* wire, int64_t planes, int64_t num_blocks, int64_t held,
                                     int64_t heads, int64_t block_size, int64_t row, const int64_t* block_ids,
                                     int64_t token_start, int64_t token_end) {
  Checksum checksum;
  const char* from = cache;
  int64_t start = 0, bytes = 0;
  const auto copy = [&](const char* next) {
    checksum.seek(start);
    checksum = copy_summing(wire + start, from, bytes, next, checksum);
  };
  for_runs(planes, num_blocks, held, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t num_bytes) {
             copy(cache + in_cache);
             from = cache + in_cache, start = on_wire, bytes = num_bytes;
           });
  copy(from);
  return checksum.value();
}

extern "C" uint64_t PD_EXPORT(wire_checksum)(const char* wire, int64_t bytes) {
  Checksum checksum;
  checksum.seek(0);
  constexpr int64_t kStep = sizeof(W);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) checksum.add(pd::load_as<W>(wire + i));
  checksum.add_last(wire + i, bytes - i);
  return checksum.value();
}

extern "C" void PD_EXPORT(scatter_tokens)(char* cache, const char* wire, int64_t planes, int64_t num_blocks, int64_t held,
                                  int64_t heads, int64_t block_size, int64_t row, const int64_t* block_ids,
                                  int64_t token_start, int64_t token_end) {
  for_runs(planes, num_blocks, held, heads, block_size, row, block_ids, token_start, token_end,
           [&](int64_t in_cache, int64_t on_wire, int64_t bytes) { copy_streaming(cache + in_cache, wire + on_wire, bytes); });
  pd::stream_fence();  // streamed stores become visible before the signal that they are done
}

// pairs: (source, destination) blocks, copied in order in every plane.
extern "C" void PD_EXPORT(copy_blocks)(char* cache, int64_t planes, int64_t num_blocks, int64_t block_bytes, const int64_t* pairs,
                               int64_t num_pairs) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    char* base = cache + plane * num_blocks * block_bytes;
    for (int64_t i = 0; i < num_pairs; ++i)
      std::memmove(base + pairs[2 * i + 1] * block_bytes, base + pairs[2 * i] * block_bytes, block_bytes);
  }
}
