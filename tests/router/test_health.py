"""Workers that fail one dispatch after another get no more of them for a while, if others can serve."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count

import pytest

from pdserve.core.failures import FailureKind
from pdserve.core.messages import Abort, Leg, Prefill, Serve
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.health import EJECTION_S, FULL_TRIAL, MAX_EJECTION_S, NUM_FAILURES, Health
from pdserve.router.live_request import PROGRESS_TOKENS
from pdserve.router.registered_worker import RegisteredWorker, RoutingState
from pdserve.router.registry import Registry

from .cluster import Cluster, make_request, worker_info

READY, EJECTED = RoutingState.READY, RoutingState.EJECTED


class Fleet:
    """Workers and their health; `fail` and `work` are outcomes of dispatches."""

    def __init__(self, *names: str) -> None:
        self.registry = Registry()
        self.health = Health(self.registry)
        self.now_s = 0.0
        for name in names:
            self.registry.add(worker_info(name))

    def __getitem__(self, name: str) -> RegisteredWorker:
        worker = self.registry.get(name)
        assert worker is not None
        return worker

    def fail(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.health.failed(self[name], "out of memory", self.now_s, self.now_s)

    def work(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.health.worked(self[name], self.now_s)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.health.review(self.now_s)


def test_only_consecutive_failures_eject_a_worker() -> None:
    fleet = Fleet("prefill-0", "prefill-1", "decode-0")
    fleet.fail("prefill-0", NUM_FAILURES - 1)
    fleet.work("prefill-0")
    fleet.fail("prefill-0", NUM_FAILURES - 1)
    assert fleet["prefill-0"].state is READY
    fleet.fail("prefill-0")
    assert fleet["prefill-0"].state is EJECTED
    assert fleet.registry.best_prefill(1, 3) == [fleet["prefill-1"]]
    assert list(fleet.health.problems()) == [
        "prefill-0 gets no requests for 10 s: 3 in a row have failed there, the last with: out of memory"
    ]


def test_an_ejected_worker_returns_on_trial_and_carries_more_with_each_success() -> None:
    fleet = Fleet("prefill-0", "prefill-1")
    fleet.fail("prefill-0", NUM_FAILURES)
    fleet.work("prefill-0")  # of a dispatch from before
    assert fleet["prefill-0"].state is EJECTED and fleet.health.next_s() == EJECTION_S
    fleet.wait(EJECTION_S)
    worker = fleet["prefill-0"]
    assert worker.state is READY and fleet.health.next_s() is None
    limits = []
    while worker.trial_limit is not None:
        limits.append(worker.trial_limit)
        worker.open_legs = {TransferId("r", index): None for index in range(worker.trial_limit)}
        assert not worker.has_prefill_room(1, None) and not worker.has_decode_room(1, 1)
        worker.open_legs.popitem()
        assert worker.has_prefill_room(1, None) and worker.has_decode_room(1, 1)
        fleet.work("prefill-0")
    assert limits == [1, 2, 4, 8, FULL_TRIAL]


def test_a_failure_on_trial_doubles_the_ejection_up_to_a_bound() -> None:
    fleet = Fleet("prefill-0", "prefill-1")
    fleet.fail("prefill-0", NUM_FAILURES)
    seconds = EJECTION_S
    for _ in range(8):
        fleet.wait(seconds)
        assert fleet["prefill-0"].state is READY
        fleet.fail("prefill-0")
        seconds = min(2 * seconds, MAX_EJECTION_S)
        assert fleet.health.next_s() == fleet.now_s + seconds
    assert seconds == MAX_EJECTION_S


@pytest.mark.parametrize(
    ("others", "is_ejected"),
    [
        (["prefill-1"], True),
        ([], False),  # nobody else prefills
        (["decode-0"], False),
        (["both-0"], True),
    ],
)
def test_the_last_worker_of_a_role_is_never_ejected(others: list[str], is_ejected: bool) -> None:
    fleet = Fleet("prefill-0", *others)
    fleet.fail("prefill-0", 10)
    assert (fleet["prefill-0"].state is EJECTED) == is_ejected


def test_where_all_fail_alike_nobody_is_ejected() -> None:
    fleet = Fleet("prefill-0", "prefill-1", "prefill-2")
    for _ in range(10):
        for name in ("prefill-0", "prefill-1", "prefill-2"):
            fleet.fail(name)
    assert [worker.state for worker in fleet.registry] == [READY] * 3


def test_at_least_half_of_a_role_stays() -> None:
    fleet = Fleet(*(f"decode-{index}" for index in range(7)))
    for index in range(6):
        fleet.fail(f"decode-{index}", 10)
    assert sum(worker.state is EJECTED for worker in fleet.registry) == 3


def test_a_smaller_worker_does_not_stand_in_for_a_larger_one() -> None:
    fleet = Fleet("prefill-0")
    fleet.registry.add(worker_info("prefill-1", max_model_len=1024))
    fleet.fail("prefill-0", 10)
    assert fleet["prefill-0"].state is READY
    fleet.fail("prefill-1", 10)
    assert fleet["prefill-1"].state is READY  # the other has failed last
    fleet.work("prefill-0")
    fleet.fail("prefill-1")
    assert fleet["prefill-1"].state is EJECTED


def test_an_ejected_worker_returns_at_once_when_the_others_are_lost() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0")
    for index in range(NUM_FAILURES):
        cluster.submit(make_request(f"r{index}", first_token=100 * index))
        fail_at(cluster, "prefill-0")
    status = cluster.router.status(cluster.now_s)
    assert [worker.state for worker in status.workers if worker.worker_id == "prefill-0"] == [EJECTED]
    assert status.degraded is not None and "prefill-0 gets no requests for 10 s" in status.degraded
    cluster.lose("prefill-1")
    cluster.submit(make_request("next", first_token=9000))
    assert isinstance(cluster.last("prefill-0"), Prefill)


def fail_at(cluster: Cluster, name: str) -> None:
    """Fails the dispatch that is running at a prefill worker, if any; the decode worker drops its part."""
    last = cluster.sent[name][-1] if cluster.sent[name] else None
    if isinstance(last, Prefill):
        cluster.leg_ended(name, Leg.PREFILL, "out of memory", kind=FailureKind.STORE)
        for command in [c for c in cluster.sent["decode-0"] if isinstance(c, Abort)][-1:]:
            cluster.leg_ended(
                "decode-0", Leg.DECODE, "aborted", transfer=command.transfer, kind=FailureKind.CANCELLED
            )


def test_a_retry_goes_to_another_worker_and_not_only_to_another_pair() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", "decode-1")
    cluster.submit(make_request())
    cluster.leg_ended("prefill-0", Leg.PREFILL, "out of memory", kind=FailureKind.STORE)
    assert isinstance(cluster.last("prefill-1"), Prefill)


def test_progress_starts_the_count_of_attempts_again() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_attempts=3))
    cluster.submit(make_request(max_tokens=200))
    for dispatch in range(6):
        assert isinstance(cluster.last("both-0"), Serve)
        for index in range(PROGRESS_TOKENS):
            cluster.token("both-0", PROGRESS_TOKENS * dispatch + index)
        cluster.leg_ended("both-0", Leg.DECODE, "out of memory", kind=FailureKind.STORE)
    assert not cluster.ends["r"]
    for _ in range(3):
        assert isinstance(cluster.last("both-0"), Serve)
        cluster.leg_ended("both-0", Leg.DECODE, "out of memory", kind=FailureKind.STORE)
        cluster.tick(5.0)
    (end,) = cluster.ends["r"]
    assert end.error is not None and end.error.startswith("gave up after 3 attempts")


def test_a_request_that_breaks_each_worker_after_a_token_is_given_up() -> None:
    cluster = Cluster("both-0", config=RouterConfig(max_attempts=5))
    cluster.submit(make_request(max_tokens=200))
    for incarnation in range(2, 7):
        cluster.token("both-0", incarnation - 2)
        cluster.lose("both-0")
        cluster.add(worker_info("both-0", incarnation=incarnation))
    (end,) = cluster.ends["r"]
    assert end.error is not None and end.error.startswith("gave up after 5 attempts")


def test_what_was_dispatched_before_a_failure_says_nothing_new() -> None:
    fleet = Fleet("prefill-0", "prefill-1")
    fleet.now_s = 5.0
    for dispatched_s in (1.0, 2.0, 3.0):
        fleet.health.failed(fleet["prefill-0"], "reset by peer", dispatched_s, fleet.now_s)
    assert fleet["prefill-0"].state is READY


def test_failures_with_a_worker_that_is_lost_are_forgiven() -> None:
    fleet = Fleet("prefill-0", "prefill-1", "decode-0", "decode-1")
    dying = fleet["decode-0"]
    for _ in range(NUM_FAILURES):
        fleet.health.failed(fleet["prefill-0"], "reset by peer", fleet.now_s, fleet.now_s, dying)
    assert fleet["prefill-0"].state is EJECTED
    fleet.registry.lose(dying)
    fleet.health.lost(dying)
    assert fleet["prefill-0"].state is READY and fleet["prefill-0"].trial_limit is None


class TimedCluster(Cluster):
    """Healthy workers take their time for a prompt of two tokens; those that are gray fail at once."""

    def __init__(self, gray: str, *, num_prefill: int, num_decode: int) -> None:
        super().__init__(
            *(f"prefill-{index}" for index in range(num_prefill)),
            *(
                worker_info(f"decode-{index}", num_blocks=100_000, max_batch_size=10_000)
                for index in range(num_decode)
            ),
            config=RouterConfig(prefill_on_decode_factor=None, max_queued_requests=10_000),
        )
        self.gray = gray
        self.num_dispatches: Counter[str] = Counter()
        self._free_s: defaultdict[str, float] = defaultdict(float)
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []
        self._number = count()

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        heappush(self._agenda, (at_s, next(self._number), action))

    def run(self) -> None:
        while self._agenda:
            self.now_s, _, action = heappop(self._agenda)
            action()
            self._obey()

    def _obey(self) -> None:
        for name, commands in list(self.sent.items()):
            taken, commands[:] = list(commands), []
            for command in taken:
                if isinstance(command, Prefill):
                    self._prefill(name, command)
        due_s = self.router.next_tick_s()
        if due_s is not None and not (self._agenda and self._agenda[0][0] <= due_s):
            self.at(due_s, self.tick)

    def _prefill(self, name: str, command: Prefill) -> None:
        transfer, decode = command.spec.transfer, command.target
        assert decode is not None
        self.num_dispatches[name] += 1
        if name == self.gray:
            self.at(self.now_s + 0.002, lambda: self._fail(name, decode.worker_id, transfer))
        else:
            self._free_s[name] = max(self._free_s[name], self.now_s) + 0.1
            self.at(self._free_s[name], lambda: self._finish(name, decode.worker_id, transfer))

    def _fail(self, name: str, decode: str, transfer: TransferId) -> None:
        self.leg_ended(name, Leg.PREFILL, "broken", transfer=transfer, kind=FailureKind.STORE)
        self.leg_ended(decode, Leg.DECODE, "aborted", transfer=transfer, kind=FailureKind.CANCELLED)

    def _finish(self, name: str, decode: str, transfer: TransferId) -> None:
        self.output(name, transfer, 0)
        self.leg_ended(name, Leg.PREFILL, transfer=transfer)
        self.output(decode, transfer, 1, FinishReason.LENGTH)
        self.leg_ended(decode, Leg.DECODE, transfer=transfer)


def test_a_prefill_worker_that_fails_fast_does_not_attract_the_traffic() -> None:
    cluster, rng, now_s = TimedCluster("prefill-0", num_prefill=8, num_decode=8), random.Random(3), 0.0
    for index in range(1000):
        now_s += rng.expovariate(56.0)  # 80 % of what seven workers can do
        request = make_request(f"r{index}", max_tokens=2, first_token=100 * index, client=f"c{index % 50}")
        cluster.at(now_s, partial(cluster.submit, request))
    cluster.run()
    assert [end.finish_reason for ends in cluster.ends.values() for end in ends] == [None] * 1000
    assert cluster.num_dispatches["prefill-0"] <= 10


@pytest.mark.parametrize("kind", [FailureKind.LOST, None])
def test_both_ends_answer_for_what_a_decode_worker_reports_before_it_decodes(
    kind: FailureKind | None,
) -> None:
    """It may only be the first to report that the prefill worker has failed."""
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.submit(make_request("r"))
    cluster.leg_ended("decode-0", Leg.DECODE, "gathering failed", kind=kind)
    assert cluster.router._health._records.keys() == {"prefill-0", "decode-0"}
