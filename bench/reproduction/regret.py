"""Regret of the live planner: goodput on traffic that changes, against static splits, other policies, and the
best splits in hindsight.

    python -m bench.reproduction.regret azure --code CSV --conversation CSV
    python -m bench.reproduction.regret mooncake --conversation JSONL
    python -m bench.reproduction.regret day

Everything is production's on virtual time: router, workers, planner, the head's desk, the fleet's choice of
whom to flip. A flip takes a second; the planner decides as often as its share of a core allows.

The bound serves each part of the traffic alone, on an empty cluster, with the best split for it: backlogs and
changes cost it nothing. Hindsight takes these splits one after the other on the whole traffic, each as its
part begins, and pays for its changes as all do."""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from pdserve.planner.changes import FLIP_S
from pdserve.router.planning import Ratio

from .changing_cluster import ChangingCluster, Outcome, Policy
from .policies import Auto, Dynamo, Fixed, Reactive, Scripted, TokenScale
from .profiles import AZURE, MOONCAKE, Service
from .traffic import Kind, Traffic, day, in_turns, recorded

HORIZON_S = 60.0
TRACES = {"azure": ("code", "conversation"), "mooncake": ("conversation",), "day": ()}
DAY_KINDS = Kind(1500, 30), Kind(700, 250)  # prompts mostly, and outputs mostly
DAY_PEAKS = 10.0, 12.0  # requests per second


@dataclass(frozen=True)
class Case:
    """Traffic, and the devices that serve it."""

    service: Service
    traffic: Traffic
    horizon_s: float
    prefill_on_decode: bool

    def serve(self, start: Ratio, policy: Policy, part: int | None = None) -> Outcome:
        cluster = ChangingCluster(self.service, start, self.horizon_s, self.prefill_on_decode)
        return cluster.serve(self.traffic if part is None else self.traffic.parts()[part], policy)

    @property
    def ratios(self) -> list[Ratio]:
        num_devices = self.service.num_devices
        return [Ratio(number, num_devices - number) for number in range(1, num_devices)]

    @property
    def policies(self) -> dict[str, Callable[[], Policy]]:
        return {
            "auto": Auto,
            "reactive": Reactive,
            "Dynamo": lambda: Dynamo(self.service),
            "TokenScale": lambda: TokenScale(self.service),
        }


@dataclass(frozen=True)
class Score:
    """Good requests by part of the traffic."""

    good: tuple[int, ...]
    changes: tuple[tuple[float, Ratio], ...]
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.good)


def scored(case: Case, name: str, start: Ratio) -> Score:
    policy = Fixed() if name == "static" else case.policies[name]()
    outcome = case.serve(start, policy)
    good = tuple(outcome.num_good(*part) for part in pairwise(case.traffic.cuts))
    advice = (
        tuple(
            f"{one.at_s:6.0f} s {one.made_for} -> {one.to or 'stays'}, trust {one.trust:.2f}: {one.reason}"
            for one in policy.advice
        )
        if isinstance(policy, Auto)
        else ()
    )
    return Score(good, tuple(outcome.changes), advice)


def hindsight_scored(case: Case, ratios: Sequence[Ratio]) -> Score:
    """`ratios`: one for each part, in force from its beginning on."""
    cuts = case.traffic.cuts
    starts = list(zip(cuts[1:-1], ratios[1:], strict=True))
    changes = [(at_s - FLIP_S, to) for (at_s, to), left in zip(starts, ratios, strict=False) if to != left]
    outcome = case.serve(ratios[0], Scripted(changes))
    return Score(tuple(outcome.num_good(*part) for part in pairwise(cuts)), tuple(outcome.changes))


def part_scored(case: Case, start: Ratio, part: int) -> int:
    return sum(case.serve(start, Fixed(), part).are_good)


def compare(case: Case, pool: ProcessPoolExecutor, start: Ratio, is_verbose: bool) -> None:
    """Prints the table."""
    traffic, num_parts = case.traffic, len(case.traffic.cuts) - 1
    policies: dict[str, Future[Score]] = {
        name: pool.submit(scored, case, name, start) for name in case.policies
    }
    static = {ratio: pool.submit(scored, case, "static", ratio) for ratio in case.ratios}
    alone = {
        (ratio, part): pool.submit(part_scored, case, ratio, part)
        for part in range(num_parts)
        for ratio in case.ratios
    }
    print(
        f"{traffic.name}: {len(traffic.rows)} requests in {traffic.duration_s:.0f} s, horizon"
        f" {case.horizon_s:g} s, {case.service.num_devices} devices, {case.service.slo},"
        f" prefill_on_decode {'auto' if case.prefill_on_decode else 'never'}; policies begin at {start}"
    )
    for decision in policies["auto"].result().advice if is_verbose else ():
        print(decision, flush=True)
    best = [max(case.ratios, key=lambda ratio: alone[ratio, part].result()) for part in range(num_parts)]
    bound = sum(alone[ratio, part].result() for part, ratio in enumerate(best))
    hindsight = pool.submit(hindsight_scored, case, best).result().total
    print(f"{'policy':<16} {'goodput':>8} {'good':>7} {'of hindsight':>13} {'changes':>8}  ratios")

    def row(name: str, total: int, num_changes: int, ratios: str) -> None:
        print(
            f"{name:<16} {total / traffic.duration_s:>8.2f} {total / len(traffic.rows):>7.1%}"
            f" {total / hindsight:>13.1%} {num_changes:>8}  {ratios}",
            flush=True,
        )

    row("bound", bound, 0, "")
    row("hindsight", hindsight, sum(a != b for a, b in pairwise(best)), " ".join(map(str, best)))
    for name, future in policies.items():
        score = future.result()
        row(
            name,
            score.total,
            len(score.changes),
            " ".join(f"{to}@{at_s:.0f}" for at_s, to in score.changes[:8]),
        )
    for ratio, future in static.items():
        row(f"static {ratio}", future.result().total, 0, "")


def _case(options: argparse.Namespace) -> Case:
    service = MOONCAKE if options.case == "mooncake" else AZURE
    return Case(service, _traffic(options, service), options.horizon, options.prefill_on_decode == "auto")


def _traffic(options: argparse.Namespace, service: Service) -> Traffic:
    longest, phase_s = service.profile.max_model_len, options.phase
    if options.case == "day":
        return day(options.seed, DAY_KINDS, DAY_PEAKS, phase_s, options.part)
    if options.case == "mooncake":
        rows = recorded(options.conversation, options.conversation_speed, 0.0, phase_s, longest)
        return in_turns("Mooncake: conversation", [(rows, phase_s)], options.part)
    first, second = (
        recorded(options.code, options.code_speed, start_s, phase_s, longest)
        for start_s in (60.0, 60.0 + phase_s)
    )
    conversation = recorded(options.conversation, options.conversation_speed, 30.0, phase_s, longest)
    pieces = [(first, phase_s), (conversation, phase_s), (second, phase_s)]
    return in_turns("Azure: code, conversation, code", pieces, options.part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", choices=("azure", "mooncake", "day"))
    parser.add_argument("--code", type=Path)
    parser.add_argument("--conversation", type=Path)
    parser.add_argument("--code-speed", type=float, default=2.5)
    parser.add_argument("--conversation-speed", type=float, default=2.6)
    parser.add_argument("--phase", type=float, default=300.0, help="seconds of a phase, or of the day")
    parser.add_argument("--part", type=float, default=100.0, help="seconds that hindsight divides")
    parser.add_argument("--horizon", type=float, default=HORIZON_S)
    parser.add_argument("--prefill-on-decode", choices=("auto", "never"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=4, help="prefill instances")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="with every decision of the planner")
    options = parser.parse_args()
    for name in TRACES[options.case]:
        if getattr(options, name) is None:
            parser.error(f"{options.case} needs --{name} FILE")
    case = _case(options)
    start = Ratio(options.start, case.service.num_devices - options.start)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        compare(case, pool, start, options.verbose)


if __name__ == "__main__":
    main()
