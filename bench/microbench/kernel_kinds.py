"""A linear by every kind of CPU kernel, one thread, by processor time: steady also beside other programs.

`python -m bench.microbench.kernel_kinds` prints gigaflops a second, the best of nine turns. Up to 32 tokens
the weights are larger than the caches."""

import time

import torch

from bench.machine import describe
from pdserve.kernels import KernelRequirements, load_kernels
from pdserve.kernels.levels import usable_levels

NUM_OUT, NUM_IN, NUM_TURNS = 2304, 768, 9


def measure(dtype: torch.dtype, num_tokens: int) -> dict[str, float]:
    """Returns the flops a second of each kind."""
    copies = 1 if num_tokens > 32 else 12
    x = torch.randn(num_tokens, NUM_IN).to(dtype)
    weights = [torch.randn(NUM_OUT, NUM_IN).to(dtype) for _ in range(copies)]
    requirements = KernelRequirements(dtype, head_dim=64, block_size=16)
    kinds = [load_kernels("cpu", requirements, kind, 1) for kind in ("torch", *usable_levels(dtype))]
    packed = {one.name: [one.pack_linear(weight) for weight in weights] for one in kinds}
    best_s = dict.fromkeys(packed, float("inf"))
    for _ in range(NUM_TURNS):
        for one in kinds:
            one.set_num_threads(1)
            start_s = time.process_time()
            for weight in packed[one.name]:
                one.linear(x, weight)
            best_s[one.name] = min(best_s[one.name], time.process_time() - start_s)
    flops = 2.0 * num_tokens * NUM_OUT * NUM_IN * copies
    return {name: flops / seconds for name, seconds in best_s.items()}


def main() -> None:
    print(describe())
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in (256, 32, 8, 1):
            rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in measure(dtype, num_tokens).items())
            print(f"{dtype}, {num_tokens} tokens: {rates}", flush=True)


if __name__ == "__main__":
    main()
