"""TetriInfer's mixes (Hu et al., arXiv 2401.11181): prompts and outputs, each light or heavy. Goodput of 1P1D
and of two colocated instances of OPT-13B on A100.

    python -m bench.reproduction.mixes

Heavy is more than 512 tokens of prompt, and more than 128 of output, as in the paper; objectives are 1 s to
the first token and 40 ms a token."""

from collections.abc import Iterator
from random import Random

from pdserve.loadgen.slo import Slo

from .profiles import OPT_13B_A100
from .sustained import Trial

SLO = Slo(ttft=1000.0, tpot=40.0)
PROMPTS = {"light": (16, 512), "heavy": (513, 1536)}
OUTPUTS = {"light": (8, 128), "heavy": (129, 384)}
NUM_REQUESTS = 500  # many more than run at a time


def lengths(prompts: tuple[int, int], outputs: tuple[int, int]) -> list[tuple[int, int]]:
    rng = Random(0)
    return [(rng.randint(*prompts), rng.randint(*outputs)) for _ in range(NUM_REQUESTS)]


def mixes() -> Iterator[tuple[str, float, float]]:
    """Yields each mix, and the rates of 1P1D and of two colocated instances."""
    for prompt, prompts in PROMPTS.items():
        for output, outputs in OUTPUTS.items():
            trial = Trial(OPT_13B_A100, 1, 1, lengths(prompts, outputs), SLO, num_requests=NUM_REQUESTS)
            colocated = trial.on(0, 2, SLO).rate(8.0)
            yield f"{prompt} prefill, {output} decode", trial.rate(colocated), colocated


def main() -> None:
    print(f"{'':<28} {'1P1D':>6} {'2 colocated':>12} {'ratio':>6}")
    for name, apart, together in mixes():
        print(f"{name:<28} {apart:>6.2f} {together:>12.2f} {apart / together:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
