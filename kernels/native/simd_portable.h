// The vector operations in the compiler's own vectors of four lanes: SSE2 on x86-64, NEON on 64-bit Arm.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pd {

PD_INLINE V load(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) std::memcpy(part + i, p + i, sizeof(float));
  return load(part);
}
PD_INLINE void store(float* p, V v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  for (int64_t i = 0; i < n; ++i) {
    const float x = v[i];
    std::memcpy(p + i, &x, sizeof x);
  }
}

// Rounds once where the processor has the instruction, twice on x86-64 without FMA.
PD_INLINE V fma(V a, V b, V c) {
#if defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

PD_INLINE V max(V a, V b) { return a > b ? a : b; }
PD_INLINE V min(V a, V b) { return a < b ? a : b; }

// For |x| below 2^22.
PD_INLINE V round(V x) {
  const V magic = set1(12582912.0f);
  return (x + magic) - magic;
}

// x * 2^n in two steps, for whole n in -252..254: one power may be no float32, each half is.
PD_INLINE V times_power_of_2(V x, V n) {
  typedef int32_t Signed __attribute__((vector_size(sizeof(V))));
  const Signed whole = __builtin_convertvector(n, Signed), half = whole >> 1;
  return x * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}

PD_INLINE float reduce_add(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
PD_INLINE float reduce_max(V v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

// v in lanes [begin, end), `other` elsewhere.
PD_INLINE V select(int64_t begin, int64_t end, V v, V other) {
  for (int i = 0; i < kLanes; ++i) v[i] = i >= begin && i < end ? v[i] : other[i];
  return v;
}

// The index of the first lane equal to x, kLanes where none is.
PD_INLINE int find(V v, V x) {
  int i = 0;
  while (i < kLanes && v[i] != x[i]) ++i;
  return i;
}

// low32 * high32 of each 64-bit word.
PD_INLINE W multiply_halves(W x) {
  for (unsigned i = 0; i < sizeof(W) / sizeof(uint64_t); ++i) x[i] = (x[i] & 0xffffffffu) * (x[i] >> 32);
  return x;
}

PD_INLINE void stream(void* p, W v) { store_as(p, v); }
inline void stream_fence() {}

// Transposes a square of dwords held in kLanes registers.
PD_INLINE void transpose(I (&x)[4]) {
  const I low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const I a = __builtin_shuffle(x[0], x[1], low), b = __builtin_shuffle(x[2], x[3], low);
  const I c = __builtin_shuffle(x[0], x[1], high), d = __builtin_shuffle(x[2], x[3], high);
  x[0] = __builtin_shuffle(a, b, first);
  x[1] = __builtin_shuffle(a, b, second);
  x[2] = __builtin_shuffle(c, d, first);
  x[3] = __builtin_shuffle(c, d, second);
}

}  // namespace pd
