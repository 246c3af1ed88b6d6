// Compiled for the plainest processor of its architecture: it must run everywhere, to report which other files may run.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// The state that the operating system saves, so that its registers may be used: XCR0.
unsigned saved_state() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return a;
}

constexpr unsigned kVectors = 0x6, kAvx512 = 0xe6, kTiles = 0x60000;  // of XCR0

bool has_features(unsigned leaf7_b, unsigned leaf7_d, unsigned subleaf1_a, unsigned state, bool fma) {
  unsigned a, b, c, d;
  if ((saved_state() & state) != state) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (fma && !(c & bit_FMA))) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & leaf7_b) != leaf7_b || (d & leaf7_d) != leaf7_d) return false;
  if (subleaf1_a == 0) return true;
  return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & subleaf1_a) == subleaf1_a;
}

constexpr unsigned kAvx512Features = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
constexpr unsigned kBF16 = 1u << 5;                       // leaf 7.1, eax
constexpr unsigned kTileFeatures = 1u << 22 | 1u << 24;   // leaf 7.0, edx: AMX-BF16, AMX-TILE

}  // namespace
#endif

// Whether the processor and the operating system allow the instructions of a level.
extern "C" int pd_cpu_has(const char* level) {
  const auto is = [&](const char* name) { return std::strcmp(level, name) == 0; };
  if (is("portable")) return 1;
#if defined(__x86_64__)
  if (is("avx2")) return has_features(bit_AVX2, 0, 0, kVectors, true);
  if (is("avx512")) return has_features(kAvx512Features, 0, 0, kAvx512, true);
  if (is("avx512_bf16")) return has_features(kAvx512Features, 0, kBF16, kAvx512, true);
  if (is("amx")) return has_features(kAvx512Features, kTileFeatures, kBF16, kAvx512 | kTiles, true);
#endif
  return 0;
}

// Asks Linux to let this process use tile registers, whose 8 KiB a thread are saved on demand; returns 0 or an errno-like
// refusal. Asking again is harmless.
extern "C" int pd_request_tiles() {
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : -1;
#else
  return -1;
#endif
}
