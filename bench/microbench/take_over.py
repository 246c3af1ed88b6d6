"""The cost of a take-over to the new router: for each worker, and in the longest turn of its loop.

python -m bench.microbench.take_over
"""

import gc
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

NUM_WORKERS, NUM_STREAMS = 8, 100
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


def main() -> None:
    rng, clock = Random(2), time.thread_time
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(WorkerMessage)
    infos = [worker(f"decode-{number}", Role.DECODE) for number in range(NUM_WORKERS)]
    frames = [
        [encoder.encode(Ready(info=info, held=frame)) for frame in in_frames(legs(number, rng))]
        for number, info in enumerate(infos)
    ]
    gc.collect()
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
    router.handle(Adopted(), 0.0)
    turns_s.append(clock() - started_s)
    while router.is_adopting:
        before_s = clock()
        router.handle(Tick(), 0.0)
        turns_s.append(clock() - before_s)
    total_s = clock() - started_s
    assert router.num_live == NUM_WORKERS * NUM_STREAMS
    num_bytes = sum(len(frame) for of_worker in frames for frame in of_worker) / NUM_WORKERS
    print(
        f"CPU time for each of {NUM_WORKERS} workers with {NUM_STREAMS} streams ({NUM_PROMPT_TOKENS:,} prompt"
        f" and {NUM_OUTPUT_TOKENS} output tokens):"
    )
    print(f"  report                {num_bytes / 1e6:8.2f} MB in {len(frames[0])} frames")
    print(
        f"  decoded in            {total_decode_s / NUM_WORKERS * 1e3:8.1f} ms, longest frame"
        f" {max(decode_s) * 1e3:.1f} ms"
    )
    print(
        f"  taken over in         {total_s / NUM_WORKERS * 1e3:8.1f} ms, {len(turns_s)} turns, median"
        f" {median(turns_s) * 1e3:.1f} ms, longest {max(turns_s) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
