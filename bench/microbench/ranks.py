"""Two ranks of one core each beside one process of two threads; their sums beside gloo and a plain copy.

`python -m bench.microbench.ranks --dtype float32` takes turns on the first two cores, and prints the best of
each and their ratio: what others do on the machine slows both. `--spin-us` sets how long a rank spins before
it sleeps, `--sums` leaves the engines out."""

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bench.machine import describe
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.parallel.follower import Follower
from pdserve.engine.parallel.group import RankGroup
from pdserve.engine.sequence import Sequence

SUM_BYTES = (8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
BATCHES = (1, 8, 32)
CONTEXT, NUM_STEPS, NUM_TURNS = 256, 24, 9
NUM_SUM_TURNS = 60
GIVE_UP_S = 120.0


def main() -> None:
    from bench.models import SHAPES, ensure_checkpoint  # imports transformers, which ranks do not need

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--spin-us", type=float, nargs="*", default=[])
    parser.add_argument("--sums", action="store_true", help="measure sums alone")
    arguments = parser.parse_args()
    print(describe(), flush=True)
    for spin_us in arguments.spin_us or [None]:
        if spin_us is not None:
            print(f"a rank spins for {spin_us:g} us", flush=True)
        _measure_sums(spin_us)
        if not arguments.sums:
            with tempfile.TemporaryDirectory() as folder:
                path = ensure_checkpoint(SHAPES[arguments.shape], arguments.dtype, Path(folder) / "model")
                _measure_engines(path, arguments.dtype, spin_us)


def _measure_sums(spin_us: float | None) -> None:
    context = multiprocessing.get_context("spawn")
    group = RankGroup.create(2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here, there = context.Pipe()
    other = context.Process(target=_sum_as, args=(1, port, there, spin_us, group.address))
    other.start()
    try:
        _sum_as(0, port, here, spin_us, group)
    finally:
        group.abort()
        other.join(GIVE_UP_S)


def _sum_as(
    rank: int, port: int, connection: Connection, spin_us: float | None, group: RankGroup | str
) -> None:
    """Both ranks make the same calls; rank 0 prints."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[rank : rank + 1])
    torch.set_num_threads(1)
    ranks = RankGroup.join(group, rank) if isinstance(group, str) else group
    _set_spin(ranks, spin_us)
    dist: Any = distributed  # its stubs are incomplete
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=GIVE_UP_S))
    gloo = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=GIVE_UP_S))
    for num_bytes in SUM_BYTES:
        x, copy = torch.zeros(num_bytes // 4), torch.zeros(num_bytes // 4)
        ways: dict[str, Callable[[], object]] = {
            "ranks": lambda x=x: ranks.all_reduce(x),  # type: ignore[misc]
            "gloo": lambda x=x: gloo.allreduce([x]).wait(),  # type: ignore[misc]
            "copy": lambda x=x, copy=copy: copy.copy_(x),  # type: ignore[misc]
        }
        best_s = dict.fromkeys(ways, float("inf"))
        count = max(1, (128 << 10) // num_bytes)  # short, so that a busy machine interrupts few turns
        for _ in range(NUM_SUM_TURNS):
            for name, way in ways.items():
                ranks.memory.meet(GIVE_UP_S)
                start_s = time.perf_counter()
                for _ in range(count):
                    way()
                best_s[name] = min(best_s[name], (time.perf_counter() - start_s) / count)
        if rank == 0:
            print(
                f"sum of {num_bytes >> 10} KiB: "
                + ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in best_s.items())
                + f"; {best_s['gloo'] / best_s['ranks']:.1f} times as fast as gloo",
                flush=True,
            )
    os.sched_setaffinity(0, cores)
    connection.close()


def _measure_engines(path: Path, dtype: str, spin_us: float | None) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in ("one process", "two ranks", "rank 1")}
    address, address_there = context.Pipe()
    processes = [
        context.Process(target=_serve, args=(path, dtype, pipes["one process"][1], None, None)),
        context.Process(target=_serve, args=(path, dtype, pipes["two ranks"][1], address_there, spin_us)),
        context.Process(target=_follow, args=(path, dtype, address, spin_us)),
    ]
    for process in processes:
        process.start()
    ways = {name: pipes[name][0] for name in ("one process", "two ranks")}
    cases = {"prefill of 512 tokens": (0, 512), **{f"decode of {size}": (size, 1) for size in BATCHES}}
    for case, work in cases.items():
        best_s = dict.fromkeys(ways, float("inf"))
        for _ in range(NUM_TURNS):
            for name, way in ways.items():
                way.send(work)
                best_s[name] = min(best_s[name], way.recv())
        one, two = best_s.values()
        print(
            f"{case}: one process {one * 1e3:.2f} ms, two ranks {two * 1e3:.2f} ms, ratio {two / one:.3f}",
            flush=True,
        )
    for way in ways.values():
        way.send(None)
    for process in processes:
        process.join(GIVE_UP_S)


def _serve(
    path: Path, dtype: Any, connection: Connection, address: Connection | None, spin_us: float | None
) -> None:
    """Times steps as `connection` asks for: with `address`, as rank 0 of two."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    group = None
    if address is not None:
        group = RankGroup.create(2)
        _set_spin(group, spin_us)
        address.send(group.address)
        cores = cores[:1]
    os.sched_setaffinity(0, cores)
    engine = Engine.open(path, _options(dtype, len(cores)), group=group)
    while (work := connection.recv()) is not None:
        connection.send(_seconds(engine, *work))
    if group is not None:
        group.stop()


def _follow(path: Path, dtype: Any, address: Connection, spin_us: float | None) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[1:2])
    group = RankGroup.join(address.recv(), 1)
    _set_spin(group, spin_us)
    Follower.open(path, _options(dtype, 1), group).run()


def _options(dtype: Any, num_threads: int) -> EngineOptions:
    num_blocks = 1 + max(BATCHES) * (CONTEXT + NUM_STEPS + 16) // 16
    return EngineOptions(dtype=dtype, num_blocks=num_blocks, num_threads=num_threads)


def _set_spin(group: RankGroup, spin_us: float | None) -> None:
    if spin_us is not None:
        group.memory.set_spin(spin_us * 1e-6)


def _seconds(engine: Engine, batch_size: int, num_tokens: int) -> float:
    """Returns the mean time of a decode step at a context of some 256 tokens, or, for a batch of 0, the time
    of one prefill."""
    lengths = [CONTEXT] * batch_size or [num_tokens]
    sequences = [_sequence(engine, length, index) for index, length in enumerate(lengths)]
    try:
        for seq in sequences[: batch_size or 0]:
            _step(engine, [seq])
        start_s = time.perf_counter()
        num_steps = NUM_STEPS if batch_size else 1
        for _ in range(num_steps):
            _step(engine, sequences)
        return (time.perf_counter() - start_s) / num_steps
    finally:
        for seq in sequences:
            engine.kv.release(seq)


def _sequence(engine: Engine, length: int, index: int) -> Sequence:
    generator = torch.Generator().manual_seed(index)
    prompt = tuple(torch.randint(0, engine.config.vocab_size, (length,), generator=generator).tolist())
    sampling = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    spec = SequenceSpec(transfer=TransferId(str(index), 0), prompt_token_ids=prompt, sampling=sampling)
    seq = Sequence(spec, 0, engine.kv.max_model_len)
    engine.kv.admit(seq, use_cache=False)
    return seq


def _step(engine: Engine, sequences: list[Sequence]) -> None:
    for seq in sequences:
        assert engine.kv.grow(seq, seq.num_tokens)
    chunks = tuple(ScheduledChunk(seq, seq.num_uncomputed_tokens, (0,)) for seq in sequences)
    sampled = engine.runner.launch(Batch(chunks, engine.kv.take_copies())).collect()
    for seq, chunk, tokens in zip(sequences, chunks, sampled, strict=True):
        engine.kv.computed(seq, chunk.num_tokens)
        seq.append(tokens[0].token_id)


if __name__ == "__main__":
    main()
