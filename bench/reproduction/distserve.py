"""DistServe's Fig. 1 (Zhong et al., OSDI 2024) beside the replay: OPT-13B on A100, prompts of 512 tokens,
outputs of 64; the highest rate at which 90 % of the requests have their first token within 0.4 s, and the
others every 0.04 s.

    python -m bench.reproduction.distserve

With the profile in DistServe's artifact an instance sustains about twice the figure's rate a GPU. Were the
instances of the figure on two GPUs each, all but the colocated rate would be as in the paper: the replay's
are divided by two. The paper's colocated instance is vLLM's, whose kernels have a profile of their own; its
rate lies between one whose prompts share steps with decoding sequences and one whose prompts do not."""

from collections.abc import Iterator
from dataclasses import replace

from pdserve.loadgen.slo import Slo

from .profiles import OPT_13B_A100, Profile
from .sustained import Trial

PROMPT, OUTPUT = 512, 64
TTFT, TPOT, BOTH = Slo(ttft=400.0), Slo(tpot=40.0), Slo(ttft=400.0, tpot=40.0)
NUM_GPUS = 2  # an instance, as the paper's rates are reproduced
MANY = 4  # instances of the phase that is not to limit

# steps of one prompt, as DistServe's prefill forms them at this length
DISTSERVE = replace(OPT_13B_A100, max_batch_tokens=PROMPT)
VLLM_STEP_S = 22.05e-3


def _vllm(prefill_step_s: float) -> Profile:
    durations = replace(
        DISTSERVE.durations,
        prefill_step_s=prefill_step_s,
        prefill_token_s=0.1405e-3,
        prefill_square_s=8.08e-9,
    )
    return replace(DISTSERVE, durations=durations)


SHARED_STEPS = _vllm(VLLM_STEP_S)
OWN_STEPS = _vllm(VLLM_STEP_S + DISTSERVE.durations.decode.step_s)  # beside decoding sequences: one more step

PREFILL_ALONE = Trial(DISTSERVE, 1, 0, [(PROMPT, 1)], TTFT)
DECODE_ALONE = Trial(DISTSERVE, MANY, 1, [(PROMPT, OUTPUT)], TPOT)


def rates() -> Iterator[tuple[str, float, float]]:
    """Yields what is served, and the paper's and the replay's requests per second and GPU."""
    request = [(PROMPT, OUTPUT)]
    for name, profile in (("shared", SHARED_STEPS), ("own", OWN_STEPS)):
        rate = Trial(profile, 0, 1, request, BOTH).rate(3.0)
        yield f"colocated, {name} steps", 1.6, rate / NUM_GPUS
    yield "prefill alone", 5.6, PREFILL_ALONE.rate(10.0) / NUM_GPUS
    yield "decode alone", 10.0, DECODE_ALONE.rate(20.0) / NUM_GPUS
    yield "2P1D", 3.3, Trial(DISTSERVE, 2, 1, request, BOTH).rate(20.0) / (3 * NUM_GPUS)


def main() -> None:
    print(f"{'':<23} {'paper':>6} {'replay':>7} {'ratio':>6}")
    for name, paper, ours in rates():
        print(f"{name:<23} {paper:>6.2f} {ours:>7.2f} {ours / paper:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
