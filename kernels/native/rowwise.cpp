// Operations on single tokens: norms, rotary embedding with the cache write, argmax. No token sees another one.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "pool.h"
#include "simd.h"

namespace pd {
namespace {

constexpr int64_t kRowsPerTask = 8;

// Calls f(row) for every row; few rows are not worth waking a thread for.
template <class F>
void for_rows(int64_t rows, F&& f) {
  parallel_for(rows < 4 * kRowsPerTask ? 1 : ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    const bool all = rows < 4 * kRowsPerTask;
    const int64_t begin = all ? 0 : task * kRowsPerTask, end = all ? rows : std::min(rows, begin + kRowsPerTask);
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

template <class T>
float inverse_rms(const T* x, int64_t n, float eps) {
  V sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load(x + i, n - i);
    sum = fma(v, v, sum);
  }
  return 1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(n) + eps);
}

// out = x / rms(x) * weight for each row; with a residual, x is added to it first and the norm is that of the
// sum.
template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t n, float eps) {
  for_rows(rows, [&](int64_t row) {
    const T* in = x + row * n;
    if (residual) {
      T* sum = residual + row * n;
      for (int64_t i = 0; i < n; i += kLanes) store(sum + i, load(sum + i, n - i) + load(in + i, n - i), n - i);
      in = sum;
    }
    const float scale = inverse_rms(in, n, eps);
    for (int64_t i = 0; i < n; i += kLanes)
      store(out + row * n + i, load(in + i, n - i) * scale * load(weight + i, n - i), n - i);
  });
}

// Norms (where there is a weight) and rotates one head: out[i], out[i + D/2] from x[i], x[i + D/2].
template <class T>
void rotate(const T* x, const T* weight, float eps, const float* cos_sin, int64_t head_dim, T* out) {
  const int64_t half = head_dim / 2;
  const float scale = weight ? inverse_rms(x, head_dim, eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    V a = load(x + i, n), b = load(x + half + i, n);
    if (weight) {
      a = a * scale * load(weight + i, n);
      b = b * scale * load(weight + half + i, n);
    }
    const V cos = load(cos_sin + i, n), sin = load(cos_sin + half + i, n);
    store(out + i, fma(a, cos, -(b * sin)), n);
    store(out + half + i, fma(b, cos, a * sin), n);
  }
}

struct Rope {
  const void *qkv, *q_norm, *k_norm;
  const int64_t *positions, *slots;
  const float* cos_sin;
  void *q, *k_cache, *v_cache;
  int64_t tokens, heads, kv_heads, head_dim, block_size;
  float eps;
};

template <class T>
void rope_and_cache(const Rope& r) {
  const int64_t d = r.head_dim;
  for_rows(r.tokens, [&](int64_t t) {
    const T* in = static_cast<const T*>(r.qkv) + t * (r.heads + 2 * r.kv_heads) * d;
    const float* cos_sin = r.cos_sin + r.positions[t] * d;
    T* q = static_cast<T*>(r.q) + t * r.heads * d;
    for (int64_t h = 0; h < r.heads; ++h)
      rotate(in + h * d, static_cast<const T*>(r.q_norm), r.eps, cos_sin, d, q + h * d);
    const T *k = in + r.heads * d, *v = k + r.kv_heads * d;
    const int64_t block = r.slots[t] / r.block_size, offset = r.slots[t] % r.block_size;
    for (int64_t h = 0; h < r.kv_heads; ++h) {
      const int64_t to = ((block * r.kv_heads + h) * r.block_size + offset) * d;
      rotate(k + h * d, static_cast<const T*>(r.k_norm), r.eps, cos_sin, d, static_cast<T*>(r.k_cache) + to);
      std::copy_n(v + h * d, d, static_cast<T*>(r.v_cache) + to);
    }
  });
}

int64_t argmax(const float* x, int64_t n) {
  V best = set1(-INFINITY);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) best = max(load(x + i), best);  // of NaN and a number, the number
  float maximum = reduce_max(best);
  for (int64_t i = whole; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  for (int64_t i = 0; i < whole; i += kLanes)
    if (const int lane = find(load(x + i), set1(maximum)); lane < kLanes) return i + lane;
  for (int64_t i = whole; i < n; ++i)
    if (x[i] == maximum) return i;
  return 0;  // every value is NaN
}

}  // namespace
}  // namespace pd

extern "C" void PD_EXPORT(rms_norm)(int bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                                    int64_t n, float eps) {
  using namespace pd;
  with_element(bf16, [&](auto element) {
    using T = typename decltype(element)::T;
    rms_norm(static_cast<const T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight), static_cast<T*>(out), rows,
             n, eps);
  });
}

extern "C" void PD_EXPORT(rope_and_cache)(int bf16, const void* qkv, const int64_t* positions, const float* cos_sin,
                                          const void* q_norm, const void* k_norm, float eps, void* k_cache,
                                          void* v_cache, const int64_t* slots, void* q, int64_t tokens, int64_t heads,
                                          int64_t kv_heads, int64_t head_dim, int64_t block_size) {
  using namespace pd;
  const Rope r{qkv,     q_norm, k_norm, positions, slots,    cos_sin,    q,  k_cache,
               v_cache, tokens, heads,  kv_heads,  head_dim, block_size, eps};
  with_element(bf16, [&](auto element) { rope_and_cache<typename decltype(element)::T>(r); });
}

extern "C" void PD_EXPORT(argmax)(const float* logits, int64_t* out, int64_t rows, int64_t n) {
  pd::parallel_for(rows, [&](int64_t row) { out[row] = pd::argmax(logits + row * n, n); });
}
