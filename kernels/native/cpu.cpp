// Compiled without vector flags: it must run on every x86-64 CPU, to report which other files may run.

// 0: no kernels run here; 1: the float32 kernels; 2: bf16 too.
extern "C" int pd_cpu_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("fma"))
    return 0;
  return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
}
