// Operations on single tokens: norms, rotary embedding with the cache write, argmax. No token sees another one.
#include <algorithm>
#include <cmath>

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

template <class E>
float inverse_rms(const typename E::T* x, int64_t n, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kLanes) {
    __m512 v = E::load(x + i, lanes(n - i));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(n) + eps);
}

// out = x / rms(x) * weight for each row; with a residual, x is added to it first and the norm is that of the
// sum.
template <class E>
void rms_norm(const typename E::T* x, typename E::T* residual, const typename E::T* weight, typename E::T* out,
              int64_t rows, int64_t n, float eps) {
  for_rows(rows, [&](int64_t row) {
    const typename E::T* in = x + row * n;
    if (residual) {
      typename E::T* sum = residual + row * n;
      for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = lanes(n - i);
        E::store(sum + i, _mm512_add_ps(E::load(sum + i, mask), E::load(in + i, mask)), mask);
      }
      in = sum;
    }
    const __m512 scale = _mm512_set1_ps(inverse_rms<E>(in, n, eps));
    for (int64_t i = 0; i < n; i += kLanes) {
      const __mmask16 mask = lanes(n - i);
      __m512 v = _mm512_mul_ps(E::load(in + i, mask), scale);
      E::store(out + row * n + i, _mm512_mul_ps(v, E::load(weight + i, mask)), mask);
    }
  });
}

// Norms (where there is a weight) and rotates one head: out[i], out[i + D/2] from x[i], x[i + D/2].
template <class E>
void rotate(const typename E::T* x, const typename E::T* weight, float eps, const float* cos_sin, int64_t head_dim,
            typename E::T* out) {
  const int64_t half = head_dim / 2;
  const __m512 scale = _mm512_set1_ps(weight ? inverse_rms<E>(x, head_dim, eps) : 1.0f);
  for (int64_t i = 0; i < half; i += kLanes) {
    const __mmask16 mask = lanes(half - i);
    __m512 a = E::load(x + i, mask), b = E::load(x + half + i, mask);
    if (weight) {
      a = _mm512_mul_ps(_mm512_mul_ps(a, scale), E::load(weight + i, mask));
      b = _mm512_mul_ps(_mm512_mul_ps(b, scale), E::load(weight + half + i, mask));
    }
    __m512 cos = F32::load(cos_sin + i, mask), sin = F32::load(cos_sin + half + i, mask);
    E::store(out + i, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)), mask);
    E::store(out + half + i, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)), mask);
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

template <class E>
void rope_and_cache(const Rope& r) {
  using T = typename E::T;
  const int64_t d = r.head_dim;
  for_rows(r.tokens, [&](int64_t t) {
    const T* in = static_cast<const T*>(r.qkv) + t * (r.heads + 2 * r.kv_heads) * d;
    const float* cos_sin = r.cos_sin + r.positions[t] * d;
    T* q = static_cast<T*>(r.q) + t * r.heads * d;
    for (int64_t h = 0; h < r.heads; ++h)
      rotate<E>(in + h * d, static_cast<const T*>(r.q_norm), r.eps, cos_sin, d, q + h * d);
    const T *k = in + r.heads * d, *v = k + r.kv_heads * d;
    const int64_t block = r.slots[t] / r.block_size, offset = r.slots[t] % r.block_size;
    for (int64_t h = 0; h < r.kv_heads; ++h) {
      const int64_t to = ((block * r.kv_heads + h) * r.block_size + offset) * d;
      rotate<E>(k + h * d, static_cast<const T*>(r.k_norm), r.eps, cos_sin, d, static_cast<T*>(r.k_cache) + to);
      std::copy_n(v + h * d, d, static_cast<T*>(r.v_cache) + to);
    }
  });
}

int64_t argmax(const float* x, int64_t n) {
  __m512 best = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < n; i += kLanes) best = _mm512_mask_max_ps(best, lanes(n - i), best, F32::load(x + i, lanes(n - i)));
  const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(best));
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 hit = _mm512_mask_cmp_ps_mask(lanes(n - i), F32::load(x + i, lanes(n - i)), maximum, _CMP_EQ_OQ);
    if (hit) return i + __builtin_ctz(hit);
  }
  return 0;  // every value is NaN
}

}  // namespace
}  // namespace pd

extern "C" void pd_rms_norm(int bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                            int64_t n, float eps) {
  using namespace pd;
  if (bf16)
    rms_norm<BF16>(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(residual), static_cast<const uint16_t*>(weight),
                   static_cast<uint16_t*>(out), rows, n, eps);
  else
    rms_norm<F32>(static_cast<const float*>(x), static_cast<float*>(residual), static_cast<const float*>(weight),
                  static_cast<float*>(out), rows, n, eps);
}

extern "C" void pd_rope_and_cache(int bf16, const void* qkv, const int64_t* positions, const float* cos_sin,
                                  const void* q_norm, const void* k_norm, float eps, void* k_cache, void* v_cache,
                                  const int64_t* slots, void* q, int64_t tokens, int64_t heads, int64_t kv_heads,
                                  int64_t head_dim, int64_t block_size) {
  using namespace pd;
  const Rope r{qkv,     q_norm, k_norm, positions, slots,    cos_sin,    q,  k_cache,
               v_cache, tokens, heads,  kv_heads,  head_dim, block_size, eps};
  bf16 ? rope_and_cache<BF16>(r) : rope_and_cache<F32>(r);
}

extern "C" void pd_argmax(const float* logits, int64_t* out, int64_t rows, int64_t n) {
  pd::parallel_for(rows, [&](int64_t row) { out[row] = pd::argmax(logits + row * n, n); });
}
