// Flash attention over one stretch of keys: the building block of the scheduling in attention.cpp.
//
// A row is one (token, query head) pair of a sequence and a kv head. Keys are taken in blocks of 64 at multiples of 64 from
// the start of the sequence, and the running softmax starts anew at every segment of 512 keys; segments are merged in
// order. All this is fixed by key positions alone, and masked keys add exact zeros, so a row's bits depend neither on the
// batch, nor on how the prompt was cut into chunks, nor on which thread took which segment.
// (Online softmax: Milakov and Gimelshein 2018; blocking: FlashAttention, Dao et al. 2022.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "keys.h"
#if defined(PD_TILES)
#include "tile_products.h"
#else
#include "vector_products.h"
#endif

namespace pd {

constexpr int64_t kSegment = 512;  // keys, a multiple of kKeys

struct Attention {
  const void *q, *k_cache, *v_cache;
  void* out;  // [tokens, heads * head_dim], as q
  const int32_t *query_start, *context_lens, *block_tables;
  int64_t num_seqs, max_blocks, heads, kv_heads, head_dim, block_size;
  int64_t window;  // keys a query may see, its own included
  float scale_log2;
  int64_t group() const { return heads / kv_heads; }
  int64_t padded_dim() const { return round_up(head_dim, 32); }  // whole pairs of the widest vectors
};

// Rows of consecutive tokens of one sequence and kv head.
struct Rows {
  int64_t seq, kv_head;
  int64_t token, num_tokens;  // in the batch
  int64_t position;           // of the first token in its sequence
  int64_t key_begin(int64_t window) const { return std::max<int64_t>(0, position - window + 1); }
  int64_t key_end() const { return position + num_tokens; }
};

// The softmax of some rows over some keys, not yet divided: for each row a maximum, kLanes partial sums, padded_dim
// outputs.
struct Partial {
  float *max, *sum, *out;
  static int64_t floats(int64_t rows, int64_t padded_dim) {
    return ceil_div(rows, kLanes) * kLanes + rows * kLanes + (rows + kSlackRows) * padded_dim;
  }
  Partial(float* memory, int64_t rows) : max(memory), sum(max + ceil_div(rows, kLanes) * kLanes), out(sum + rows * kLanes) {}
  void clear(int64_t rows, int64_t padded_dim) {
    std::fill_n(max, rows, -INFINITY);
    std::fill_n(sum, rows * (kLanes + padded_dim), 0.0f);
  }
};

inline void scale_row(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, factor * load(x + i));
}

inline float exp2_scalar(float x) { return exp2(set1(x))[0]; }

// total += segment, row by row.
inline void merge(Partial& total, const Partial& segment, int64_t rows, int64_t padded_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (segment.max[r] == -INFINITY) continue;
    const float max = std::max(total.max[r], segment.max[r]);
    const V a = exp2(set1(total.max[r] - max)), b = exp2(set1(segment.max[r] - max));
    auto add = [&](float* x, const float* y, int64_t n) {
      for (int64_t i = 0; i < n; i += kLanes) store(x + i, fma(b, load(y + i), a * load(x + i)));
    };
    add(total.sum + r * kLanes, segment.sum + r * kLanes, kLanes);
    add(total.out + r * padded_dim, segment.out + r * padded_dim, padded_dim);
    total.max[r] = max;
  }
}

static_assert(kFewRows <= kProductRows, "scores and weights have room for a tile's rows");

// One thread's working memory for rows of one (sequence, kv head).
template <class E>
class RowAttention {
  using T = typename E::T;
  static constexpr int kPer = E::kPerDword;

 public:
  static size_t bytes(const Attention& a, int64_t rows) {
    const int64_t dim = a.padded_dim();
    return 4 * ((rows + kSlackRows) * dim + 2 * dim * kKeys + kProductRows * kKeys * 2 + 2 * Partial::floats(rows, dim));
  }

  // `next` are the rows this thread will probably do next: their first keys are prefetched at the end of
  // these.
  RowAttention(const Attention& a, const Rows& rows, const Rows& next, void* memory)
      : a_(a),
        rows_(rows),
        next_(next),
        num_rows_(rows.num_tokens * a.group()),
        dim_(a.padded_dim()),
        depth_(a.head_dim / kPer),
        stride_(round_up(depth_, 16)),
        keys_(static_cast<uint32_t*>(memory)),
        values_(keys_ + dim_ * kKeys),
        scores_(reinterpret_cast<float*>(values_ + dim_ * kKeys)),
        weights_(reinterpret_cast<uint32_t*>(scores_ + kProductRows * kKeys)),
        queries_(weights_ + kProductRows * kKeys),
        total_(reinterpret_cast<float*>(queries_ + (num_rows_ + kSlackRows) * dim_), num_rows_),
        segment_(total_.max + Partial::floats(num_rows_, dim_), num_rows_) {
    const T* q = static_cast<const T*>(a.q) + (rows.token * a.heads + rows.kv_head * a.group()) * a.head_dim;
    for (int64_t r = 0; r < num_rows_; ++r) {
      const T* from = q + (r / a.group() * a.heads + r % a.group()) * a.head_dim;
      for (int64_t d = 0; d < stride_; d += kLanes)
        store_as(queries_ + r * stride_ + d, E::dwords(from + d * kPer, depth_ - d));
    }
  }

  int64_t num_rows() const { return num_rows_; }
  const Partial& total() const { return total_; }

  // Attends to the keys of segment `index` that any of the rows sees.
  void attend_segment(int64_t index, Partial& to) {
    to.clear(num_rows_, dim_);
    const int64_t begin = std::max(rows_.key_begin(a_.window), index * kSegment) / kKeys * kKeys;
    const int64_t end = std::min(rows_.key_end(), (index + 1) * kSegment);
    for (int64_t key = begin; key < end; key += kKeys) attend_keys(key, std::min<int64_t>(kKeys, rows_.key_end() - key), to);
  }

  void attend_all() {
    total_.clear(num_rows_, dim_);
    for (int64_t s = rows_.key_begin(a_.window) / kSegment; s < ceil_div(rows_.key_end(), kSegment); ++s) {
      attend_segment(s, segment_);
      merge(total_, segment_, num_rows_, dim_);
    }
    write(total_);
  }

  void write(const Partial& total) {
    for (int64_t r = 0; r < num_rows_; ++r) {
      const int64_t token = rows_.token + r / a_.group(), head = rows_.kv_head * a_.group() + r % a_.group();
      T* out = static_cast<T*>(a_.out) + (token * a_.heads + head) * a_.head_dim;
      const float scale = 1.0f / reduce_add(load(total.sum + r * kLanes));
      for (int64_t d = 0; d < a_.head_dim; d += kLanes)
        pd::store(out + d, scale * load(total.out + r * dim_ + d), a_.head_dim - d);
    }
  }

 private:
  void attend_keys(int64_t key, int64_t num_keys, Partial& to) {
    const KeyBlock<T> here = ahead_.key == key ? ahead_ : find(rows_, key);
    const bool last = key + kKeys >= rows_.key_end();
    ahead_ = last ? find(next_, next_.key_begin(a_.window) / kKeys * kKeys) : find(rows_, key + kKeys);
    if (num_rows_ <= kFewRows) {
      with_rows<kFewRows>(num_rows_, [&](auto rows) { attend_few<rows.value>(here, num_keys, to); });
      return;
    }
    pack_keys<E>(here, ahead_, a_.head_dim, keys_);
    pack_values<E>(here, ahead_, a_.head_dim, dim_, values_);
    const int64_t tiles = ceil_div(num_rows_, kProductRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = product_row(tile, tiles, num_rows_), next = product_row(tile + 1, tiles, num_rows_);
      const int64_t first = rows_.position + row / a_.group(), last = rows_.position + (next - 1) / a_.group();
      if (key > last || key + num_keys <= first - a_.window + 1) continue;  // no row of the tile sees a key of the block
      score<E>(tiles_, queries_ + row * stride_, stride_, depth_, keys_, next - row, scores_);
      for (int64_t i = 0; i < next - row; ++i) softmax_row(i, row + i, key, num_keys, to);
      add_values<E>(tiles_, weights_, values_, next - row, dim_, to.out + row * dim_);
    }
  }

  KeyBlock<T> find(const Rows& rows, int64_t key) const {
    const T *k_cache = static_cast<const T*>(a_.k_cache), *v_cache = static_cast<const T*>(a_.v_cache);
    const int32_t* table = a_.block_tables + rows.seq * a_.max_blocks;
    KeyBlock<T> found;
    found.key = key;
    found.count = std::min<int64_t>(kKeys, rows.key_end() - key);
    for (int64_t k = 0; k < kKeys; k += 8) {
      const int64_t at = k < found.count ? key + k : key;
      const int64_t row = (table[at / a_.block_size] * a_.kv_heads + rows.kv_head) * a_.block_size + at % a_.block_size;
      found.keys[k / 8] = k_cache + row * a_.head_dim;
      found.values[k / 8] = v_cache + row * a_.head_dim;
    }
    return found;
  }

  template <int ROWS>
  void attend_few(const KeyBlock<T>& here, int64_t num_keys, Partial& to) {
    constexpr int kVecs = few_vecs(ROWS);
    score_unpacked<E, ROWS>(here, ahead_, a_.head_dim, queries_, stride_, scores_);
    for (int i = 0; i < ROWS; ++i) softmax_row(i, i, here.key, num_keys, to);
    int64_t d = 0;
    for (; d + kVecs * kLanes <= dim_; d += kVecs * kLanes)
      add_values_unpacked<E, ROWS, kVecs>(here, ahead_, a_.head_dim, d, weights_, to.out + d, dim_);
    if (d < dim_) add_values_unpacked<E, ROWS, 2>(here, ahead_, a_.head_dim, d, weights_, to.out + d, dim_);
  }

  // Turns row i of scores_ into weights under the row's running maximum, rescaling the earlier sums.
  void softmax_row(int i, int64_t row, int64_t key, int64_t num_keys, Partial& to) {
    const int64_t position = rows_.position + row / a_.group();
    const int64_t begin = std::max<int64_t>(0, position - a_.window + 1 - key), end = std::min(num_keys, position + 1 - key);
    V s[kKeys / kLanes], seen_max = set1(-INFINITY);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys / kLanes; ++j) {
      const V scores = a_.scale_log2 * load(scores_ + i * kKeys + j * kLanes);
      s[j] = select(begin - j * kLanes, end - j * kLanes, scores, set1(-INFINITY));
      seen_max = pd::max(seen_max, s[j]);
    }
    const float old_max = to.max[row], max = std::max(old_max, reduce_max(seen_max));
    if (max > old_max) {
      const float factor = exp2_scalar(old_max - max);
      scale_row(to.sum + row * kLanes, kLanes, factor);
      scale_row(to.out + row * dim_, dim_, factor);
      to.max[row] = max;
    }
    const V top = set1(max == -INFINITY ? 0.0f : max);
    auto* weights = reinterpret_cast<typename E::Operand*>(weights_ + i * (kKeys / kPer));
    V sum = load(to.sum + row * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys / kLanes; ++j) {
      const V p = exp2(s[j] - top);
      pd::store(weights + j * kLanes, p, kLanes);
      sum += p;
    }
    store(to.sum + row * kLanes, sum);
  }

  const Attention& a_;
  const Rows &rows_, &next_;
  const int64_t num_rows_, dim_, depth_, stride_;
  uint32_t *keys_, *values_;
  float* scores_;
  uint32_t *weights_, *queries_;
  Partial total_, segment_;
  KeyBlock<T> ahead_;
  Tiles tiles_;
};

}  // namespace pd
