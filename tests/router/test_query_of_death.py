"""A request that ends the process of the worker that computes it costs two workers at most, and bystanders
none of their attempts."""

from collections import Counter
from collections.abc import Callable

import pytest

from pdserve.core.errors import KillsWorkers
from pdserve.core.failures import FailureKind
from pdserve.core.messages import Leg, Prefill, Reserve, Serve, StepReport, TokenOutput, WorkerLoad
from pdserve.core.request import FinishReason, Request, SequenceSpec
from pdserve.core.token_ids import digest
from pdserve.router.config import RouterConfig
from pdserve.router.deaths import MAX_CONVICTIONS, MAX_KEPT, REFUSED_S, Deaths
from pdserve.router.events import Cancel, LossCause, WorkerDraining, WorkerLost, WorkersExpected
from pdserve.router.live_requests import MAX_VERDICT_S
from pdserve.router.registered_worker import RoutingState

from .cluster import Cluster, make_request, worker_info

DIED, GONE, UNKNOWN = LossCause.DIED, LossCause.GONE, LossCause.UNKNOWN


class DeadlyCluster(Cluster):
    """Workers that compute what they are sent, and die of a step with `is_deadly` work in it."""

    def __init__(self, *workers: str, is_deadly: Callable[[SequenceSpec, int], bool]) -> None:
        super().__init__(*workers, config=RouterConfig(max_attempts=2))
        self.is_deadly = is_deadly
        self.deaths: list[set[str]] = []  # with each, the requests that were at the worker
        self._next: dict[tuple[str, str, int], int] = {}
        self._num_read: Counter[str] = Counter()

    def is_alive(self, worker_id: str) -> bool:
        return any(w.worker_id == worker_id for w in self.router.status(self.now_s).workers)

    def die(self, worker_id: str) -> None:
        registered = self.router._registry.get(worker_id)
        assert registered is not None
        self.deaths.append({transfer.request_id for transfer in registered.open_legs})
        incarnation = self.incarnations[worker_id]
        self.handle(WorkerLost(worker_id, incarnation, "connection reset", UNKNOWN))
        self.now_s += 0.01
        self.handle(WorkerLost(worker_id, incarnation, "SIGSEGV", DIED))

    def step(self, worker_id: str) -> None:
        """Computes a token of each dispatch that is open at the worker."""
        if not self.is_alive(worker_id):
            return
        registered = self.router._registry.get(worker_id)
        assert registered is not None
        work = [c for c in self.sent[worker_id] if isinstance(c, Prefill | Serve | Reserve)]
        for command in work:
            spec = command.spec
            if spec.transfer not in registered.open_legs:
                continue
            if isinstance(command, Reserve) and not self._has_first_token(spec):
                continue
            index = len(self.tokens[spec.transfer.request_id, 0])
            if self.is_deadly(spec, index):
                self.die(worker_id)
                return
            last = FinishReason.LENGTH if index == spec.sampling.max_tokens - 1 else None
            self.handle(
                StepReport(
                    worker_id=worker_id,
                    incarnation=self.incarnations[worker_id],
                    load=WorkerLoad(),
                    outputs=(TokenOutput(spec.transfer, 0, index, 100 + index, last),),
                )
            )
            if isinstance(command, Prefill):
                self.leg_ended(worker_id, Leg.PREFILL, transfer=spec.transfer)
            elif last is not None:
                self.leg_ended(worker_id, Leg.DECODE, transfer=spec.transfer)

    def _has_first_token(self, spec: SequenceSpec) -> bool:
        return len(self.tokens[spec.transfer.request_id, 0]) > len(spec.output_token_ids)

    def obey_aborts(self) -> None:
        for worker_id in list(self.sent):
            registered = self.router._registry.get(worker_id)
            for transfer in self.aborts(worker_id):
                dispatch = self.router._ledger.get(transfer)
                if registered is not None and transfer in registered.open_legs and dispatch is not None:
                    leg = dispatch.leg_at(registered)
                    kind = FailureKind.CANCELLED
                    self.leg_ended(worker_id, leg, "aborted", transfer=transfer, kind=kind)

    def run(self, num_rounds: int = 60) -> None:
        """Lets the workers work; dead ones come back after two rounds."""
        for number in range(num_rounds):
            for worker_id in list(self.incarnations):
                self.step(worker_id)
                self.obey_aborts()
            for worker_id, incarnation in list(self.incarnations.items()):
                if number % 2 and not self.is_alive(worker_id):
                    self.add(worker_info(worker_id, incarnation=incarnation + 1))
            self.tick(0.1)


def of(name: str, index: int = 0) -> Callable[[SequenceSpec, int], bool]:
    return lambda spec, at: spec.transfer.request_id == name and at >= index


def crowd(cluster: Cluster, num: int = 8) -> list[Request]:
    requests = [
        make_request(f"user{n}", 20, max_tokens=40, client=f"key:u{n}", first_token=1000 * n)
        for n in range(num)
    ]
    for request in requests:
        cluster.submit(request)
    return requests


PAIRS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.mark.parametrize("index", [0, 1, 7])
@pytest.mark.parametrize("workers", [PAIRS, ("both-0", "both-1"), ("prefill-0", "decode-0"), ("both-0",)])
def test_a_deadly_request_kills_two_workers_and_ends_alone(workers: tuple[str, ...], index: int) -> None:
    cluster = DeadlyCluster(*workers, is_deadly=of("poison", index))
    users = crowd(cluster)
    cluster.run(3)
    cluster.submit(make_request("poison", 20, max_tokens=40, client="key:x", first_token=10**6))
    cluster.run(400)
    assert len(cluster.deaths) == 2
    assert cluster.deaths[1] == {"poison"}, "nobody else was there"
    (end,) = cluster.ends["poison"]
    assert end.finish_reason is FinishReason.FATAL
    for user in users:
        (end,) = cluster.ends[user.request_id]
        assert end.finish_reason is None, end.error
        assert len(cluster.tokens[user.request_id, 0]) == 40
    assert {w.state for w in cluster.router.status(cluster.now_s).workers} == {RoutingState.READY}


def test_a_client_that_sends_it_again_is_refused() -> None:
    cluster = DeadlyCluster(*PAIRS, is_deadly=lambda spec, _: spec.prompt_token_ids[0] == 10**6)
    cluster.submit(make_request("poison", client="key:x", first_token=10**6))
    cluster.run()
    for name in ("poison", "other-name"):
        with pytest.raises(KillsWorkers):
            cluster.submit(make_request(name, client="key:x", first_token=10**6))
    assert len(cluster.deaths) == 2
    cluster.submit(make_request("poison-too", client="key:y", first_token=5))
    cluster.run()
    assert cluster.ends["poison-too"][0].finish_reason is None


def test_a_convict_that_comes_back_runs_alone_and_is_refused_for_longer() -> None:
    cluster = DeadlyCluster(*PAIRS, is_deadly=of("poison"))
    request = make_request("poison", client="key:x")
    cluster.submit(request)
    cluster.run()
    cluster.tick(REFUSED_S)
    crowd(cluster)
    cluster.submit(request)
    cluster.run()
    assert len(cluster.deaths) == 3
    assert cluster.deaths[2] == {"poison"}
    cluster.tick(REFUSED_S)
    with pytest.raises(KillsWorkers):
        cluster.submit(request)


def test_a_request_cancelled_after_a_death_is_a_suspect_next_time() -> None:
    cluster = DeadlyCluster(*PAIRS, is_deadly=of("poison"))
    request = make_request("poison", client="key:x")
    crowd(cluster)
    cluster.submit(request)
    while not cluster.deaths:
        cluster.run(1)
    cluster.handle(Cancel("poison"))
    cluster.run()
    cluster.submit(request)
    cluster.run()
    assert len(cluster.deaths) == 2
    assert cluster.deaths[1] == {"poison"}
    assert cluster.ends["poison"][1].finish_reason is FinishReason.FATAL


def test_a_worker_that_was_cut_off_makes_no_suspects() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a"))
    cluster.submit(make_request("b"))
    (lost,) = [name for name, num in cluster.num_legs().items() if num][:1]
    other = "both-1" if lost == "both-0" else "both-0"
    num_before = len(cluster.sent[other])
    cluster.handle(WorkerLost(lost, 1, "connection reset", UNKNOWN))
    assert len(cluster.sent[other]) == num_before, "the cause decides how it continues"
    cluster.handle(WorkerLost(lost, 1, "it was asked to end", GONE))
    assert len(cluster.sent[other]) > num_before
    assert not cluster.router._queue.suspects


def test_an_unexplained_loss_delays_a_request_by_some_seconds_at_most() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a"))
    (lost,) = [name for name, num in cluster.num_legs().items() if num]
    other = "both-1" if lost == "both-0" else "both-0"
    cluster.handle(WorkerLost(lost, 1, "connection reset", UNKNOWN))
    assert cluster.router.next_tick_s() == pytest.approx(cluster.now_s + MAX_VERDICT_S)
    cluster.tick(MAX_VERDICT_S)
    assert isinstance(cluster.last(other), Serve)


def test_a_standstill_of_the_router_does_not_make_a_verdict_late() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a"))
    (lost,) = [name for name, num in cluster.num_legs().items() if num]
    other = "both-1" if lost == "both-0" else "both-0"
    num_before = len(cluster.sent[other])
    cluster.handle(WorkerLost(lost, 1, "connection reset", UNKNOWN))
    cluster.tick(20.0)
    assert len(cluster.sent[other]) == num_before
    assert cluster.router.next_tick_s() == pytest.approx(cluster.now_s + MAX_VERDICT_S)
    cluster.handle(WorkerLost(lost, 1, "SIGKILL", DIED))
    assert cluster.router._registry.apart(), "it runs alone"


def test_a_late_verdict_makes_a_suspect_of_a_stuck_request() -> None:
    cluster = Cluster("both-0", "both-1")
    cluster.submit(make_request("a", max_tokens=40))
    (lost,) = [name for name, num in cluster.num_legs().items() if num]
    other = "both-1" if lost == "both-0" else "both-0"
    cluster.handle(WorkerLost(lost, 1, "connection reset", UNKNOWN))
    cluster.tick(MAX_VERDICT_S)
    transfer = cluster.spec(other).transfer
    cluster.handle(WorkerLost(lost, 1, "SIGKILL", DIED))
    assert cluster.aborts(other) == [transfer]
    assert cluster.router._queue.suspects


def test_a_request_that_lost_both_workers_waits_for_both_verdicts() -> None:
    cluster = Cluster("prefill-0", "decode-0", "prefill-1", "decode-1")
    cluster.submit(make_request("a", max_tokens=40))
    lost = [name for name, num in cluster.num_legs().items() if num]
    assert len(lost) == 2
    for name in lost:
        cluster.handle(WorkerLost(name, 1, "connection reset", UNKNOWN))
    cluster.handle(WorkerLost(lost[0], 1, "it was asked to end", GONE))
    assert not any(cluster.num_legs().values())
    cluster.handle(WorkerLost(lost[1], 1, "SIGKILL", DIED))
    assert cluster.router._registry.apart(), "it runs alone"


def test_what_failed_just_before_a_worker_was_lost_waits_for_the_verdict_too() -> None:
    cluster = Cluster("prefill-0", "decode-0", "prefill-1", "decode-1")
    cluster.submit(make_request("a", max_tokens=40))
    prefill, decode = sorted((name for name, num in cluster.num_legs().items() if num), reverse=True)
    cluster.leg_ended(prefill, Leg.PREFILL, "the peer is gone", kind=FailureKind.LOST)
    cluster.handle(WorkerLost(decode, 1, "connection reset", UNKNOWN))
    cluster.tick(MAX_VERDICT_S - 0.1)
    assert not any(cluster.num_legs().values())
    cluster.handle(WorkerLost(decode, 1, "it was asked to end", GONE))
    assert sum(cluster.num_legs().values()) == 2


def test_deaths_are_not_among_a_requests_attempts() -> None:
    cluster = DeadlyCluster("both-0", "both-1", is_deadly=lambda spec, at: False)
    (user,) = crowd(cluster, 1)
    for _ in range(4):  # at most 2 attempts may fail
        cluster.run(6)
        cluster.die(next(name for name, num in cluster.num_legs().items() if num))
    cluster.run(80)
    assert cluster.ends[user.request_id][0].finish_reason is None


def test_the_broken_transfer_of_a_dying_worker_is_judged_with_it() -> None:
    """The other end of the transfer reports first."""
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.submit(make_request("a"))
    decode = "decode-0" if cluster.sent["decode-0"] else "decode-1"
    cluster.leg_ended("prefill-0", Leg.PREFILL, "connection reset", kind=FailureKind.LOST)
    cluster.handle(WorkerLost(decode, 1, "connection reset", UNKNOWN))
    cluster.handle(WorkerLost(decode, 1, "SIGSEGV", DIED))
    assert [type(cluster.last(apart.worker_id)) for apart in cluster.router._registry.apart()] == [Serve]


def test_a_worker_that_only_sends_kv_makes_no_suspect() -> None:
    cluster = Cluster("prefill-0", "decode-0", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.submit(make_request("a", max_tokens=40))
    cluster.token("prefill-0", 0)
    cluster.token("decode-0", 1)
    cluster.handle(WorkerLost("prefill-0", 1, "killed", DIED))
    assert not cluster.aborts("decode-0")
    assert not cluster.router._queue.suspects


def test_a_suspect_leaves_a_prefill_worker_once_it_is_cleared() -> None:
    cluster = DeadlyCluster("prefill-0", "decode-0", is_deadly=lambda spec, at: False)
    (user,) = crowd(cluster, 1)
    cluster.run(4)
    cluster.die("decode-0")
    assert isinstance(cluster.last("prefill-0"), Serve)
    cluster.add(worker_info("decode-0", incarnation=2))
    cluster.run(5)
    assert isinstance(cluster.last("prefill-0"), Prefill)
    cluster.run(80)
    assert cluster.ends[user.request_id][0].finish_reason is None


def test_a_worker_set_apart_may_drain() -> None:
    cluster = DeadlyCluster("prefill-0", "prefill-1", "decode-0", is_deadly=lambda spec, at: False)
    crowd(cluster, 4)
    cluster.run(3)
    cluster.die("decode-0")
    apart = cluster.router._registry.apart()
    cluster.handle(WorkerDraining(apart[0].worker_id))
    assert apart[0].state is RoutingState.DRAINING
    assert apart[0] not in cluster.router._registry.apart(), "another one takes its place"


def test_no_more_than_half_of_the_workers_are_set_apart() -> None:
    cluster = DeadlyCluster(*(f"both-{n}" for n in range(4)), is_deadly=lambda spec, at: False)
    crowd(cluster, 40)
    cluster.run(3)
    cluster.die("both-0")
    for _ in range(10):
        assert len(cluster.router._registry.apart()) <= 2
        cluster.run(1)


def test_a_client_that_kills_with_a_new_request_each_time_soon_kills_beside_nobody() -> None:
    cluster = DeadlyCluster(
        *PAIRS, is_deadly=lambda spec, at: spec.transfer.request_id.startswith("poison") and at > 0
    )
    for number in range(6):
        users = crowd(cluster)
        cluster.run(3)
        name = f"poison{number}"
        cluster.submit(make_request(name, 20, client="key:x", first_token=10**6 + 1000 * number))
        cluster.run(400)
        assert cluster.ends[name][-1].finish_reason is FinishReason.FATAL
        assert all(cluster.ends[user.request_id].pop().finish_reason is None for user in users)
        cluster.tokens.clear()
        cluster.choice_ends.clear()
    assert [len(at) > 1 for at in cluster.deaths] == [True, False] * 3 + [False] * 3
    with pytest.raises(KillsWorkers, match="6 requests of this client"):
        cluster.submit(make_request("harmless", client="key:x", first_token=5))


def test_a_client_that_goes_on_killing_is_refused_for_twice_as_long_each_time() -> None:
    deaths, now_s, num_killed, begins_s = Deaths(), 0.0, 0, []
    while now_s < 86_400.0:
        new = make_request(f"r{num_killed}", client="key:x", first_token=50 * num_killed)
        try:
            deaths.num_under(new, now_s)
        except KillsWorkers:
            now_s += 60.0
            continue
        if num_killed % MAX_CONVICTIONS == 0:
            begins_s.append(now_s)
        convict(deaths, new, now_s)
        num_killed += 1
    assert begins_s == [0.0] + [REFUSED_S * (2.0**k - 1) for k in range(1, 8)]
    assert num_killed == 48


def test_a_likely_killer_ends_when_no_second_worker_has_come_in_time() -> None:
    cluster = DeadlyCluster("both-0", is_deadly=lambda spec, at: False)
    cluster.handle(WorkersExpected(1))
    for number in range(3):
        request = make_request(f"r{number}", client="key:x", first_token=50 * number)
        convict(cluster.router._requests.deaths, request, 0.0)
    cluster.submit(make_request("again", client="key:x", first_token=5000))
    (user,) = crowd(cluster, 1)
    limit_s = cluster.router.config.max_wait_for_worker_s
    cluster.run()
    assert cluster.ends[user.request_id] and not cluster.ends["again"]
    due_s = cluster.router.next_tick_s()
    assert due_s is not None and due_s <= limit_s
    cluster.tick(limit_s)
    (end,) = cluster.ends["again"]
    assert end.finish_reason is FinishReason.ERROR
    assert end.error == (
        "workers died of requests like this one, which does not run on the last worker;"
        f" no other has become ready in {limit_s:g} s"
    )
    assert not cluster.num_legs()["both-0"]


def convict(deaths: Deaths, request: Request, now_s: float) -> None:
    deaths.convict(request, digest(request.prompt_token_ids), now_s)


def test_the_last_worker_is_not_risked_for_a_likely_killer_while_another_starts() -> None:
    cluster = DeadlyCluster("both-0", "both-1", is_deadly=lambda spec, at: False)
    deaths = cluster.router._requests.deaths
    for number in range(3):
        convict(deaths, make_request(f"r{number}", client="key:x", first_token=50 * number), 0.0)
    cluster.die("both-0")
    cluster.submit(make_request("again", client="key:x", first_token=5000))
    (user,) = crowd(cluster, 1)
    for _ in range(100):
        cluster.step("both-1")
        cluster.tick(0.1)
    assert cluster.ends[user.request_id] and not cluster.ends["again"]
    cluster.run()
    assert cluster.ends["again"][0].finish_reason is None


def test_a_clients_convictions_are_forgotten_in_time_and_concern_no_other() -> None:
    deaths = Deaths()
    for number in range(3):
        convict(deaths, make_request(f"r{number}", client="key:x", first_token=50 * number), float(number))
    new = make_request("new", client="key:x", first_token=5000)
    assert deaths.num_under(new, 10.0) == 3
    assert deaths.num_under(make_request("new", client="key:y", first_token=5000), 10.0) == 0
    assert deaths.num_under(new, REFUSED_S) == 0


def test_an_address_runs_alone_first_and_is_not_refused_for_one_behind_it() -> None:
    deaths = Deaths()
    for number in range(2 * MAX_CONVICTIONS):
        convict(deaths, make_request(f"r{number}", client="address:10.0.0.1", first_token=50 * number), 0.0)
    assert deaths.num_under(make_request("new", client="address:10.0.0.1", first_token=5000), 1.0) > 0
    assert deaths.num_under(make_request("new", client="address:10.0.0.2", first_token=5000), 1.0) == 0


def test_memory_of_deaths_is_bounded() -> None:
    deaths = Deaths()
    for number in range(3 * MAX_KEPT):
        convict(deaths, make_request(f"r{number}", first_token=number), 0.0)
    assert len(deaths._records) == 2 * MAX_KEPT
    with pytest.raises(KillsWorkers):
        deaths.num_under(make_request(f"r{3 * MAX_KEPT - 1}"), 1.0)
    assert deaths.num_under(make_request("r0"), 1.0) == 0


def test_a_client_is_recognised_by_its_key_and_not_by_its_address() -> None:
    deaths = Deaths()
    convict(deaths, make_request("a", client="key:one"), 0.0)
    convict(deaths, make_request("b", client="ipv4:10.0.0.1:4711", first_token=50), 0.0)
    assert deaths.num_under(make_request("a", client="key:two"), 1.0) == 0
    with pytest.raises(KillsWorkers):
        deaths.num_under(make_request("b", client="ipv4:10.0.0.1:4712", first_token=99), 1.0)
