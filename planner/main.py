"""The planner process: summaries on its standard input, advice on its standard output, until the input ends.

It has a lower priority than the head, which starts another one when it dies; what it has seen is lost then,
and nothing else."""

import gc
import os
import select
import sys
import time

from ..core import limited_process
from ..core.codec import FrameDecoder, FrameEncoder
from ..core.limited_process import cpu_limit, limit_memory, write_all
from ..router.planning import Summary
from .live import LivePlanner
from .pace import Pace

NICENESS = 10
DECISION_S = 60.0  # of processor time: some seconds are usual
MEMORY_BYTES = 2 << 30  # address space beyond what is used at the start
READ_BYTES = 1 << 18


def main() -> None:
    limited_process.set_up(NICENESS)
    limited_process.serve_or_die(_serve)


def _serve() -> None:
    gc.freeze()
    limit_memory(MEMORY_BYTES)
    decoder: FrameDecoder[Summary] = FrameDecoder(Summary)
    encoder, planner, pace = FrameEncoder(), LivePlanner(), Pace()
    source = sys.stdin.fileno()
    latest: Summary | None = None
    while data := os.read(source, READ_BYTES):
        for summary in decoder.feed(data):
            planner.observe(summary)
            latest = summary
        if latest is None or select.select([source], [], [], 0.0)[0]:
            continue  # the newest summary is still to come
        if pace.allows(latest.at_s) and planner.is_due:
            started_s = time.process_time()
            with cpu_limit(DECISION_S):
                advice = planner.decide()
            pace.spend(time.process_time() - started_s)
            write_all(sys.stdout.fileno(), encoder.encode(advice))
        latest = None


if __name__ == "__main__":
    main()
