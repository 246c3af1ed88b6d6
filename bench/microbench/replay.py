"""The speed of replays in virtual time, which `pdserve plan --devices` consists of: requests and tokens a
second of CPU time.

    python -m bench.microbench.replay [--requests 600]

A Llama of 8 billion parameters on two H200, one prefill and one decode instance; prompts of 1,000 tokens."""

import argparse
import statistics
import time

from pdserve.loadgen.slo import Slo
from pdserve.planner.splits import Split
from tests.planner.replay_support import drawn, site

RATE = 60.0
OUTPUTS = (10, 100)  # tokens
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=600)
    num_requests = parser.parse_args().requests
    there = site()
    for num_tokens in OUTPUTS:
        load = drawn(RATE, 1000, num_tokens, num_requests)
        seconds = []
        for _ in range(ROUNDS):
            started_s = time.process_time()
            there.try_out(Split(1, 1), load, RATE, Slo(ttft=300.0), 0)
            seconds.append(time.process_time() - started_s)
        median_s = statistics.median(seconds)
        print(
            f"outputs of {num_tokens:>3} tokens: {num_requests / median_s:6.0f} requests/s,"
            f" {num_requests * num_tokens / median_s:7.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
