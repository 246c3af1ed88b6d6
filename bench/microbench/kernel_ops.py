"""Each kind of native kernel beside torch, in turns in one run: time, rate, and share of what the machine
can do.

`python -m bench.microbench.kernel_ops --dtype bfloat16 --threads 2 --kernels avx512_bf16 avx2`. The machine's
limits are measured first, by a loop of each kind's multiplies that never leaves the registers and by reading
as many bytes as the cases with few tokens read, 96 MiB, with the same threads."""

import argparse
import ctypes
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import describe
from pdserve.kernels import AttentionBatch, KernelRequirements, Kernels, build, load_kernels
from pdserve.kernels.levels import usable_levels

_PEAK_SOURCE = r"""
#include "simd.h"
using namespace pd;
constexpr int kSums = 12;

extern "C" long flops_per_round(int bf16) { return kSums * kLanes * 2 * (bf16 ? BF16::kPerDword : 1); }

template <class E>
static float multiply(long n) {
  I one = (I)set1(1e-9f);
  V acc[kSums] = {};
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) {
      acc[j] = E::dot(acc[j], one, one);
      asm volatile("" : "+" REGISTER(acc[j]));
    }
  }
  V sum{};
#pragma GCC unroll 16
  for (int j = 0; j < kSums; ++j) sum += acc[j];
  return reduce_add(sum);
}
extern "C" float multiply(int bf16, long n) { return bf16 ? multiply<BF16>(n) : multiply<F32>(n); }

extern "C" float read(const float* p, long n) {
  V sum[4] = {};
  for (long i = 0; i < n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j * kLanes % 16 == 0) __builtin_prefetch(p + i + j * kLanes + 1024, 0, 3);
      sum[j] += load(p + i + j * kLanes);
    }
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
"""


@dataclass(frozen=True)
class Peak:
    flops: float  # per second, all threads together
    bytes: float


@dataclass(frozen=True)
class Case:
    name: str
    flops: float
    bytes: float
    run: Callable[[Kernels], object]


Clock = Callable[[], float]


def in_threads(num_threads: int, call: Callable[[], object], clock: Clock) -> float:
    """Seconds until every thread has made the call (ctypes lets them run at once)."""
    threads = [threading.Thread(target=call) for _ in range(num_threads)]
    start = clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clock() - start


def measure_peak(level: str, dtype: torch.dtype, num_threads: int, clock: Clock) -> Peak:
    machine = platform.machine()
    with tempfile.TemporaryDirectory() as tmp:
        source, library = Path(tmp) / "peak.cpp", Path(tmp) / "peak.so"
        source.write_text(_PEAK_SOURCE)
        register = "w" if machine == "aarch64" else "v" if level.startswith("avx512") else "x"
        flags = [*build.LEVELS[machine][level], f'-DREGISTER(x)="{register}"(x)', f"-I{build.SOURCES}"]
        command = ["g++", "-std=c++17", "-O3", "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        c = ctypes.CDLL(str(library))
    bf16 = int(dtype == torch.bfloat16)
    c.flops_per_round.restype = ctypes.c_long
    c.multiply.argtypes, c.read.argtypes = [ctypes.c_int, ctypes.c_long], [ctypes.c_void_p, ctypes.c_long]
    count, memory = 5_000_000, torch.ones(24 << 20)
    flops, num_bytes = count * c.flops_per_round(bf16), memory.numel() * 4

    def best_s(call: Callable[[], object]) -> float:
        return min(in_threads(num_threads, call, clock) for _ in range(8))

    multiply_s = best_s(lambda: c.multiply(bf16, count))
    read_s = best_s(lambda: c.read(memory.data_ptr(), memory.numel()))
    return Peak(num_threads * flops / multiply_s, num_threads * num_bytes / read_s)


def linear_case(dtype: torch.dtype, num_out: int, num_in: int, num_tokens: int) -> Case:
    """A case over enough copies of the weights that a step cannot keep them in the cache."""
    copies = max(1, (96 << 20) // (num_out * num_in * dtype.itemsize)) if num_tokens <= 64 else 1
    weights = [torch.randn(num_out, num_in).to(dtype) for _ in range(copies)]
    x = torch.randn(num_tokens, num_in).to(dtype)
    packed = {}

    def run(kernels: Kernels) -> None:
        if kernels.name not in packed:
            packed[kernels.name] = [kernels.pack_linear(weight) for weight in weights]
        for each in packed[kernels.name]:
            kernels.linear(x, each)

    flops = 2.0 * num_tokens * num_out * num_in * copies
    return Case(
        f"linear {num_in}->{num_out}, {num_tokens} tokens", flops, sum(w.nbytes for w in weights), run
    )


def attention_case(
    dtype: torch.dtype, heads: int, kv_heads: int, query_len: int, context: int, num_seqs: int
) -> Case:
    head_dim, block_size = 64, 16
    blocks = -(-context // block_size)
    cache = torch.randn(2, num_seqs * blocks, kv_heads, block_size, head_dim).to(dtype)
    batch = AttentionBatch(
        torch.arange(0, (num_seqs + 1) * query_len, query_len, dtype=torch.int32),
        torch.full((num_seqs,), context, dtype=torch.int32),
        torch.randperm(num_seqs * blocks).int().view(num_seqs, blocks),
        torch.zeros(num_seqs * query_len, dtype=torch.int64),
    )
    q = torch.randn(num_seqs * query_len, heads, head_dim).to(dtype)
    pairs = num_seqs * (query_len * context - query_len * (query_len - 1) // 2)
    return Case(
        f"attention {heads}/{kv_heads} heads, {num_seqs} x {query_len} of {context}",
        4.0 * pairs * heads * head_dim,
        2.0 * num_seqs * context * kv_heads * head_dim * dtype.itemsize,
        lambda kernels: kernels.paged_attention(q, cache[0], cache[1], batch, head_dim**-0.5),
    )


def transfer_case(dtype: torch.dtype) -> Case:
    cache = torch.randn(12, 2, 200, 12, 16, 64).to(dtype)
    num_tokens = 1024
    block_ids = torch.randperm(200)[:64].tolist()
    buffer = torch.empty(12 * 2 * 12 * num_tokens * 64 * dtype.itemsize, dtype=torch.uint8)
    return Case(
        f"gather {buffer.numel() >> 20} MiB",
        0.0,
        2.0 * buffer.numel(),
        lambda kernels: kernels.gather_tokens(cache, 0, 12, block_ids, 0, num_tokens, buffer),
    )


def cases(dtype: torch.dtype) -> list[Case]:
    linears = [
        linear_case(dtype, num_out, num_in, num_tokens)
        for num_out, num_in in [(2304, 768), (768, 3072), (896, 4864)]
        for num_tokens in (1, 8, 32, 1024)
    ]
    shapes = [(1, 256, 1), (1, 256, 32), (1, 1024, 32), (1024, 1024, 1)]
    attentions = [attention_case(dtype, *heads, *shape) for heads in [(12, 12), (14, 2)] for shape in shapes]
    return [*linears, *attentions, transfer_case(dtype)]


def compare(
    case: Case, contestants: list[Kernels], num_threads: int, num_rounds: int, clock: Clock
) -> list[float]:
    """Median seconds of each, taking turns so that a disturbance hits all."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(num_rounds):
        for kernels, mine in zip(contestants, times, strict=True):
            kernels.set_num_threads(num_threads)
            time.sleep(0.02)  # the others' threads still spin for a moment, waiting for work
            mine.append(min(_seconds(case, kernels, clock) for _ in range(4)))
    return [statistics.median(mine) for mine in times]


def _seconds(case: Case, kernels: Kernels, clock: Clock) -> float:
    start = clock()
    case.run(kernels)
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", nargs="+", help="kinds of kernel; by default all that run here")
    parser.add_argument("--case", default="", help="only the cases with this in their name")
    parser.add_argument(
        "--cpu-time", action="store_true", help="by processor time, beside other programs; for one thread"
    )
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error(f"--cpu-time: got --threads {options.threads}, expected --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    dtype = getattr(torch, options.dtype)
    requirements = KernelRequirements(dtype, head_dim=64, block_size=16)
    kinds = options.kernels or usable_levels(dtype)
    contestants = [load_kernels("cpu", requirements, kind, options.threads) for kind in ("torch", *kinds)]
    peaks = {kind: measure_peak(kind, dtype, options.threads, clock) for kind in kinds}
    print(describe())
    for kind, peak in peaks.items():
        limits = f"{peak.flops / 1e9:.0f} GFLOP/s, {peak.bytes / 1e9:.0f} GB/s at most"
        print(f"{options.dtype}, {options.threads} threads, {kind}: {limits}")
    print(
        f"{'':44}{'kind':>12}{'time':>10}{'torch':>10}{'faster':>8}{'GFLOP/s':>9}{'GB/s':>7}{'of limit':>9}"
    )
    for case in cases(dtype):
        if options.case not in case.name:
            continue
        torch_s, *times_s = compare(case, contestants, options.threads, options.rounds, clock)
        for (kind, peak), seconds in zip(peaks.items(), times_s, strict=True):
            share = max(case.flops / seconds / peak.flops, case.bytes / seconds / peak.bytes)
            print(
                f"{case.name:44}{kind:>12}{seconds * 1e6:8.0f}us{torch_s * 1e6:8.0f}us"
                f"{torch_s / seconds:7.1f}x{case.flops / seconds / 1e9:9.0f}"
                f"{case.bytes / seconds / 1e9:7.1f}{share:9.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
