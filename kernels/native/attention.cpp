// Cuts paged attention into tasks: a stretch of tokens of one sequence and kv head each, so that the query heads of a group
// read their keys once. Where that gives too few tasks (long contexts, small batches), single segments of keys are tasks
// too, merged afterwards in their order.
#include "attention.h"

#include <memory>
#include <vector>

#include "export.h"
#include "pool.h"

namespace pd {
namespace {

constexpr int64_t kMaxRows = 168;  // per task: enough that packing its keys is cheap

std::vector<Rows> cut_rows(const Attention& a) {
  const int64_t tokens_per_task = std::max<int64_t>(1, kMaxRows / a.group());
  std::vector<Rows> cut;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t begin = a.query_start[s], end = a.query_start[s + 1];
    const int64_t stretches = ceil_div(end - begin, tokens_per_task);
    for (int64_t i = stretches - 1; i >= 0; --i) {  // the last tokens see the most keys: longest first
      const int64_t token = begin + (end - begin) * i / stretches, next = begin + (end - begin) * (i + 1) / stretches;
      for (int64_t h = 0; h < a.kv_heads; ++h)
        cut.push_back({s, h, token, next - token, a.context_lens[s] - (end - token)});
    }
  }
  return cut;
}

template <class E>
RowAttention<E> attention_of(const Attention& a, const Rows& rows, const Rows& next) {
  return RowAttention<E>(a, rows, next, scratch(RowAttention<E>::bytes(a, rows.num_tokens * a.group())));
}

template <class E>
void attend_whole(const Attention& a, const std::vector<Rows>& cut) {
  const int64_t count = cut.size();
  const int64_t run = std::clamp<int64_t>(count / (8 * num_threads()), 1, a.kv_heads);
  parallel_for(ceil_div(count, run), [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * run);
    for (int64_t i = task * run; i < end; ++i) attention_of<E>(a, cut[i], cut[std::min(i + 1, end - 1)]).attend_all();
  });
}

template <class E>
void attend_in_segments(const Attention& a, const std::vector<Rows>& cut) {
  struct Segment {
    const Rows* rows;
    int64_t index, partial;
  };
  std::vector<Segment> segments;
  std::vector<size_t> first;  // of each element of `cut`
  int64_t floats = 0;
  for (const Rows& rows : cut) {
    first.push_back(segments.size());
    for (int64_t s = rows.key_begin(a.window) / kSegment; s < ceil_div(rows.key_end(), kSegment); ++s) {
      segments.push_back({&rows, s, floats});
      floats += Partial::floats(rows.num_tokens * a.group(), a.padded_dim());
    }
  }
  first.push_back(segments.size());
  const std::unique_ptr<float[]> partials(new float[floats]);
  parallel_for(segments.size(), [&](int64_t i) {
    const Segment& segment = segments[i];
    auto rows = attention_of<E>(a, *segment.rows, *segment.rows);
    Partial to(&partials[segment.partial], rows.num_rows());
    rows.attend_segment(segment.index, to);
  });
  parallel_for(cut.size(), [&](int64_t i) {
    auto rows = attention_of<E>(a, cut[i], cut[i]);
    Partial total(rows.total());
    total.clear(rows.num_rows(), a.padded_dim());
    for (size_t s = first[i]; s < first[i + 1]; ++s)
      merge(total, Partial(&partials[segments[s].partial], rows.num_rows()), rows.num_rows(), a.padded_dim());
    rows.write(total);
  });
}

template <class E>
void attend(const Attention& a) {
  const std::vector<Rows> cut = cut_rows(a);
  const bool few = num_threads() > 1 && static_cast<int64_t>(cut.size()) < 4 * num_threads();
  const bool long_context = std::any_of(cut.begin(), cut.end(), [](const Rows& r) { return r.key_end() > kSegment; });
  few && long_context ? attend_in_segments<E>(a, cut) : attend_whole<E>(a, cut);
}

}  // namespace
}  // namespace pd

extern "C" void PD_EXPORT(paged_attention)(int bf16, const void* q, const void* k_cache, const void* v_cache, void* out,
                                   const int32_t* query_start, const int32_t* context_lens, const int32_t* block_tables,
                                   int64_t num_seqs, int64_t max_blocks, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                   int64_t block_size, int64_t window, float scale) {
  using namespace pd;
  const Attention a{q,        k_cache,    v_cache, out,      query_start, context_lens, block_tables,
                    num_seqs, max_blocks, heads,   kv_heads, head_dim,    block_size,   window, scale * 1.44269504f};
  with_element(bf16, [&](auto element) { attend<decltype(element)>(a); });
}
