// The matrix registers of AMX: eight tiles of 16 rows of 16 dwords, and C += A B over pairs of bf16.
//
// Tiles are the processor's registers, or with PD_TILES=2 a model of them in software that rounds as they do, so that the
// kernels above can be tested on any machine. (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define PD_TILES_HARDWARE 1
#define PD_TILES_MODEL 2

namespace pd {

constexpr int kTileSide = 16;

#if PD_TILES == PD_TILES_HARDWARE

// Tiles are configured while one of these lives, on its thread alone.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  // Rows are `stride` bytes apart.
  template <int T>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  template <int T>
  void zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileSide; ++r) std::memcpy(tiles_[T][r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int T>
  void store(void* to, int64_t stride) {
    for (int r = 0; r < kTileSide; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles_[T][r], 64);
  }

  // Sums of the even and of the odd elements of the pairs from zero, each a fused multiply-add in float32; then the two
  // together; then onto C. Denormal operands and results count as zero.
  template <int C, int A, int B>
  void multiply() {
    for (int m = 0; m < kTileSide; ++m) {
      float even[kTileSide] = {}, odd[kTileSide] = {}, c[kTileSide];
      for (int k = 0; k < kTileSide; ++k) {
        const uint32_t a = tiles_[A][m][k], *b = tiles_[B][k];
        for (int n = 0; n < kTileSide; ++n) {
          even[n] = flush(std::fma(low(a), low(b[n]), even[n]));
          odd[n] = flush(std::fma(high(a), high(b[n]), odd[n]));
        }
      }
      std::memcpy(c, tiles_[C][m], sizeof c);
      for (int n = 0; n < kTileSide; ++n) c[n] = flush(flush(c[n]) + flush(even[n] + odd[n]));
      std::memcpy(tiles_[C][m], c, sizeof c);
    }
  }

 private:
  static float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

  static float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flush(x);
  }
  static float low(uint32_t pair) { return as_float(pair << 16); }
  static float high(uint32_t pair) { return as_float(pair & 0xffff0000u); }

  uint32_t tiles_[8][kTileSide][kTileSide];
};

#endif

}  // namespace pd
