"""The live planner's cost to the head's loop: processor time of each request that ends, and of a summary
every five seconds.

    python -m bench.microbench.planner_summaries [--rate 100]"""

import argparse
import time
from collections.abc import Callable

from msgspec import structs

from pdserve.core.codec import FrameEncoder
from pdserve.core.request import FinishReason
from pdserve.head.planning import INTERVAL_S, Planning
from pdserve.router.events import Timeline
from pdserve.router.planning import Ratio
from tests.planner.live_support import FollowedCluster, Load, terms

ROUNDS = 2000


class _Planning(Planning):
    """Only records."""

    def __init__(self) -> None:
        self.terms = terms()
        self._seen = []  # type: ignore[assignment]


def cpu_us(call: Callable[[], object], rounds: int) -> float:
    started_s = time.process_time()
    for _ in range(rounds):
        call()
    return (time.process_time() - started_s) / rounds * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0)
    rate = parser.parse_args().rate
    timeline = Timeline(
        request_id="r",
        submitted_s=10.0,
        first_token_s=10.5,
        ended_s=11.0,
        dispatches=(),
        finish_reasons=(FinishReason.STOP,),
        num_prompt_tokens=700,
        num_output_tokens=(50,),
        client="c",
    )
    planning = _Planning()
    each_us = cpu_us(lambda: planning.closed(timeline), ROUNDS)
    cluster = FollowedCluster(Ratio(4, 4))
    summary = structs.replace(cluster.summary(Load(rate, 700, 50)), number=1)
    encoder = FrameEncoder()
    summary_us = cpu_us(lambda: encoder.encode(summary), ROUNDS // 10)
    share = (each_us * rate + summary_us / INTERVAL_S) / 1e6
    print(f"a request that ended: {each_us:.1f} us; a summary of {len(summary.seen)}: {summary_us:.0f} us")
    print(f"at {rate:g} requests/s: {share:.3%} of a core")


if __name__ == "__main__":
    main()
