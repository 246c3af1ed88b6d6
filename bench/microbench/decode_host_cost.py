"""The host cost of a decode step: a worker's whole step, with all GPU work stubbed out.

`python -m bench.microbench.decode_host_cost`

No kernel runs, no graph is replayed, and torch's own operations on logits have next to nothing to do, so that
what is left is scheduling, packing, sampling's lists, and reporting. The CUDA calls of a step, about 0.3 ms,
come on top on a GPU."""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels without a GPU

import torch

from bench.comparison.peers.pdserve_peer import ColocatedWorker
from bench.gpu import engines
from bench.gpu.engines import open_random_engine, options_for
from bench.gpu.shapes import QWEN3_06B, Shape
from pdserve.engine import engine as engine_module
from pdserve.engine.batch import Batch
from pdserve.engine.device import Graph, HostDevice
from pdserve.engine.on_gpu import decode_graphs
from pdserve.engine.on_gpu.drawn_tokens import DrawnTokens
from pdserve.engine.on_gpu.runner import DeviceRunner
from pdserve.kernels.triton import paged_attention
from pdserve.kernels.triton.kernels import TritonKernels
from pdserve.kernels.triton.launch import Launch

_NUM_MULTIPROCESSORS = 132  # an H200's: plans are as long as they are there
_SHAPE = Shape(
    "Qwen3-0.6B, narrow",
    QWEN3_06B.options | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
)


class _NoGraph:
    def replay(self) -> None:
        pass


class _NoDevice(HostDevice):
    """Accepts all work and does none."""

    runs_ahead = True

    def capture(self, work: Callable[[], None]) -> Graph:
        return _NoGraph()


def _no_prefill(_runner: DeviceRunner, batch: Batch, _on_layer: object) -> torch.Tensor:
    return torch.zeros((sum(bool(chunk.choices) for chunk in batch.chunks), _SHAPE.config.vocab_size))


@contextlib.contextmanager
def _nothing_computes() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, substitute in (
            (Launch, "run", lambda _launch: None),
            (
                DrawnTokens,
                "take",
                lambda _drawn, _places, otherwise: otherwise,
            ),  # a kernel's result: not rubbish, as it indexes
            (DeviceRunner, "_run_eagerly", _no_prefill),
            (engines, "device_of", lambda _options: _NoDevice()),
            (paged_attention, "num_multiprocessors", lambda _device: _NUM_MULTIPROCESSORS),
            (decode_graphs, "num_multiprocessors", lambda _device: _NUM_MULTIPROCESSORS),
            (
                engine_module,
                "load_kernels",
                lambda _device, requirements, _choice, _threads: TritonKernels(requirements),
            ),
        ):
            stack.enter_context(patch.object(owner, name, substitute))
        yield


def _steps(
    batch_size: int, prompt_len: int, num_steps: int, temperature: float
) -> tuple[list[float], list[float]]:
    """The wall-clock and CPU seconds of each step in which all sequences are decoded."""
    length = prompt_len + num_steps
    options = options_for(
        "cuda",
        num_tokens=batch_size * length,
        max_model_len=length,
        max_batch_size=batch_size,
        max_batch_tokens=batch_size * prompt_len,
    )
    engine = open_random_engine(_SHAPE, options)
    worker = ColocatedWorker(engine, max_batch_size=batch_size, max_batch_tokens=batch_size * prompt_len)
    wall_s, cpu_s = [], []
    step = worker._worker.step

    def timed() -> object:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = step()
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.thread_time() - cpu)
        return result

    with patch.object(worker._worker, "step", timed):
        worker.serve((list(range(prompt_len)), num_steps, temperature) for _ in range(batch_size))
    return wall_s[2:-2], cpu_s[2:-2]  # without the prompts' step and the last ones, which end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=560)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("host time of a decode step, milliseconds: processor (median, least), wall (median)")
    with _nothing_computes():
        for batch_size in arguments.batch_sizes:
            wall_s, cpu_s = _steps(batch_size, arguments.prompt_len, arguments.steps, arguments.temperature)
            figures = (statistics.median(cpu_s), min(cpu_s), statistics.median(wall_s))
            print(
                f"batch {batch_size:>3}  " + "  ".join(f"{1e3 * figure:6.3f}" for figure in figures),
                flush=True,
            )


if __name__ == "__main__":
    main()
