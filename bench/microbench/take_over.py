"""The cost of a take-over to the new router: for each worker, in its loop's longest turn, and in memory.

    python -m bench.microbench.take_over [--workers 64]

Memory is the most that it took after any turn, and what is kept until the clients are back."""

import argparse
import gc
import os
import time
from random import Random
from statistics import median

import msgspec

from pdserve.core.messages import HeldLeg, Leg, Ready, Role, TokenOutput, WorkerMessage
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.router.core import Router
from pdserve.router.events import Adopted, Tick, WorkerReady
from pdserve.worker.held_legs import in_frames

from .router import worker

NUM_STREAMS = 100
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 1500, 300


def legs(number_of_worker: int, rng: Random) -> tuple[HeldLeg, ...]:
    """Returns the streams that a worker decodes."""
    held = []
    for number in range(NUM_STREAMS):
        transfer = TransferId(f"r{number_of_worker}-{number}", number)
        prompt = tuple(rng.randrange(128_000) for _ in range(NUM_PROMPT_TOKENS))
        spec = SequenceSpec(
            transfer=transfer, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1000)
        )
        outputs = tuple(
            TokenOutput(transfer, 0, index, rng.randrange(128_000)) for index in range(NUM_OUTPUT_TOKENS)
        )
        held.append(HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False))
    return tuple(held)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=64)
    num_workers = parser.parse_args().workers
    rng, clock = Random(2), time.thread_time
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(WorkerMessage)
    infos = [worker(f"decode-{number}", Role.DECODE) for number in range(num_workers)]
    frames = [
        [encoder.encode(Ready(info=info, held=frame)) for frame in in_frames(legs(number, rng))]
        for number, info in enumerate(infos)
    ]
    gc.collect()
    gc.freeze()
    before_bytes = resident_bytes()
    started_s, decoded, decode_s = clock(), [], []
    for of_worker in frames:
        held: tuple[HeldLeg, ...] = ()
        for frame in of_worker:
            before_s = clock()
            message = decoder.decode(frame)
            decode_s.append(clock() - before_s)
            assert isinstance(message, Ready)
            held += message.held
        decoded.append(held)
    total_decode_s = clock() - started_s
    router = Router(adopts=True, first_attempt=10**9)
    started_s, turns_s = clock(), []
    for info, of_worker_held in zip(infos, decoded, strict=True):
        router.handle(WorkerReady(info, of_worker_held), 0.0)
    decoded.clear()
    del held, message, of_worker_held
    router.handle(Adopted(), 0.0)
    turns_s.append(clock() - started_s)
    most_bytes = 0
    while router.is_adopting:
        most_bytes = max(most_bytes, resident_bytes() - before_bytes)
        before_s = clock()
        router.handle(Tick(), 0.0)
        turns_s.append(clock() - before_s)
    total_s = sum(turns_s)
    gc.collect()
    kept_bytes = resident_bytes() - before_bytes
    assert router.num_live == num_workers * NUM_STREAMS
    num_bytes = sum(len(frame) for of_worker in frames for frame in of_worker) / num_workers
    print(
        f"CPU time for each of {num_workers} workers with {NUM_STREAMS} streams ({NUM_PROMPT_TOKENS:,} prompt"
        f" and {NUM_OUTPUT_TOKENS} output tokens):"
    )
    print(f"  report                {num_bytes / 1e6:8.2f} MB in {len(frames[0])} frames")
    print(
        f"  decoded in            {total_decode_s / num_workers * 1e3:8.1f} ms, longest frame"
        f" {max(decode_s) * 1e3:.1f} ms"
    )
    print(
        f"  taken over in         {total_s / num_workers * 1e3:8.1f} ms, {len(turns_s)} turns, median"
        f" {median(turns_s) * 1e3:.1f} ms, longest {max(turns_s) * 1e3:.1f} ms"
    )
    print(
        f"  memory                {most_bytes / num_workers / 1e6:8.2f} MB, afterwards"
        f" {kept_bytes / num_workers / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
