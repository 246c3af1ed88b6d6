"""The hosts that serve, given the configuration, Ray's view and the hosts' answers."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from pdserve.core.errors import InvalidTransition
from pdserve.core.hosts import ExpectedHosts, HostState
from pdserve.core.messages import Role
from pdserve.core.needs import Need
from pdserve.router.cores import Capacity
from pdserve.router.events import Tick
from pdserve.router.fleet_events import HostJoined
from pdserve.router.hosts import (
    CHECK_AGAIN_S,
    TRANSITIONS,
    CheckHost,
    ExpectHosts,
    HostAction,
    HostChanged,
    HostChecked,
    HostEvent,
    HostRefused,
    Hosts,
    HostsSeen,
    HostSuspected,
    SeenHost,
    VacateHost,
    _Host,
)
from pdserve.router.places import Places

HEAD = SeenHost("n1", "10.0.0.1", "head", is_head=True)
B = SeenHost("n2", "10.0.0.2", "b")
C = SeenHost("n3", "10.0.0.3", "c")
CAPACITY = Capacity(2)


class Cluster:
    """Hosts with a clock; the configuration asks for B and C besides the head's."""

    def __init__(self, expected: ExpectedHosts | None = None, join_timeout_s: float = 60.0) -> None:
        self.hosts = Hosts(Places())
        self.now_s = 0.0
        self.handle(ExpectHosts(expected or ExpectedHosts(("10.0.0.2", "c")), join_timeout_s))

    def handle(self, event: HostEvent, after_s: float = 0.0) -> list[HostAction]:
        self.now_s += after_s
        return self.hosts.handle(event, self.now_s)

    def see(self, *seen: SeenHost, after_s: float = 1.0) -> list[str]:
        """The hosts to check."""
        return [
            action.node_id
            for action in self.handle(HostsSeen(seen), after_s)
            if isinstance(action, CheckHost)
        ]

    def join(self, *seen: SeenHost) -> None:
        for node_id in self.see(*seen):
            self.handle(HostChecked(node_id, CAPACITY))

    @property
    def states(self) -> dict[str, str]:
        return {host.address: host.state.value for host in self.hosts.status(self.now_s)}

    def place(self, worker_id: str, role: Role = Role.DECODE) -> str | None:
        """Returns the node on which the worker gets a place."""
        self.hosts.places.ask((worker_id, 1), role, Need(1, 1.0))
        found = self.hosts.places.next()
        return None if found is None else found[1].node_id


def changes(actions: Iterable[HostAction]) -> list[tuple[str, HostState]]:
    return [(action.name, action.state) for action in actions if isinstance(action, HostChanged)]


def test_hosts_serve_once_they_have_joined_and_answered() -> None:
    cluster = Cluster()
    assert cluster.see(HEAD, B) == ["n1", "n2"]
    assert cluster.states == {"10.0.0.1": "checking", "10.0.0.2": "checking", "c": "awaited"}
    assert cluster.place("decode-0") is None
    cluster.handle(HostChecked("n2", CAPACITY))
    assert cluster.hosts.places.next() is not None
    cluster.handle(HostChecked("n1", CAPACITY))
    assert cluster.states == {"10.0.0.1": "joined", "10.0.0.2": "joined", "c": "awaited"}
    assert cluster.hosts.problems() == "host c: has not joined; waiting for it"
    cluster.join(HEAD, B, C)
    assert cluster.hosts.problems() is None
    assert cluster.see(HEAD, B, C) == []


def test_a_late_host_is_reported_once_and_may_still_join() -> None:
    cluster = Cluster(ExpectedHosts(("10.0.0.2",)), join_timeout_s=60.0)
    cluster.join(HEAD)
    assert changes(cluster.handle(Tick(), after_s=58.0)) == []
    assert changes(cluster.handle(Tick(), after_s=1.0)) == [("10.0.0.2", HostState.AWAITED)]
    assert changes(cluster.handle(Tick(), after_s=1.0)) == []
    assert cluster.hosts.problems() == (
        "host 10.0.0.2: has not joined within join_timeout_s (60 s): serving without it until it does"
    )
    cluster.join(HEAD, B)
    assert cluster.states["10.0.0.2"] == "joined"


def test_a_dead_host_takes_no_instance_until_it_rejoins() -> None:
    cluster = Cluster()
    cluster.join(B)
    assert cluster.place("decode-0") == "n2"
    cluster.see()
    assert cluster.states == {"10.0.0.2": "lost", "c": "awaited"}
    assert cluster.place("decode-1") is None
    assert "is lost" in (cluster.hosts.problems() or "")
    assert cluster.see(SeenHost("n9", "10.0.0.2", "b")) == ["n9"]
    cluster.handle(HostChecked("n9", CAPACITY))
    assert cluster.states == {"10.0.0.2": "joined", "c": "awaited"}
    found = cluster.hosts.places.next()
    assert found is not None and found[1].node_id == "n9"


def test_a_lost_host_that_nobody_asked_for_is_forgotten() -> None:
    cluster = Cluster(ExpectedHosts())
    cluster.join(HEAD, B)
    cluster.see(HEAD)
    assert cluster.states == {"10.0.0.1": "joined"}
    assert cluster.hosts.problems() is None


def test_a_host_joins_once_however_often_it_is_checked() -> None:
    """A failure on a host that answers is not the host's doing."""
    cluster = Cluster(ExpectedHosts(("10.0.0.2",)))
    answer = HostChecked("n2", CAPACITY)
    cluster.see(B)
    assert HostJoined() in cluster.handle(answer)
    cluster.handle(HostSuspected("n2"))
    assert HostJoined() not in cluster.handle(answer)
    cluster.see()
    cluster.see(replace(B, node_id="n4"))
    assert HostJoined() in cluster.handle(replace(answer, node_id="n4"))


def test_a_refused_host_is_rechecked_with_backoff_and_reported_once() -> None:
    cluster = Cluster(ExpectedHosts(("10.0.0.2",)))
    cluster.see(B)
    no = HostChecked("n2", CAPACITY, "it runs pdserve 0.0.9")
    assert changes(cluster.handle(no)) == [("10.0.0.2", HostState.REFUSED)]
    assert cluster.hosts.problems() == "host 10.0.0.2: it runs pdserve 0.0.9"
    assert cluster.place("decode-0") is None
    for backoff_s in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):
        assert cluster.handle(Tick(), after_s=backoff_s - 0.1) == []
        assert cluster.handle(Tick(), after_s=0.1) == [CheckHost("n2")]
        assert changes(cluster.handle(no)) == []
    cluster.handle(Tick(), after_s=60.0)
    cluster.handle(HostChecked("n2", CAPACITY, warning="its clock is 3600 s ahead"))
    assert cluster.hosts.places.next() is not None
    (row,) = cluster.hosts.status(cluster.now_s)
    assert (row.state, row.message) == (HostState.JOINED, "its clock is 3600 s ahead")


def test_a_host_removed_from_the_file_is_vacated_until_it_returns() -> None:
    cluster = Cluster()
    cluster.join(HEAD, B, C)
    on = {name: cluster.place(name) for name in ("decode-0", "decode-1", "decode-2")}
    there = tuple((name, 1) for name, node_id in on.items() if node_id == "n3")
    actions = cluster.handle(ExpectHosts(ExpectedHosts(("10.0.0.2",)), 60.0))
    assert [action for action in actions if isinstance(action, VacateHost)] == [VacateHost(there)]
    assert cluster.states["10.0.0.3"] == "leaving"
    assert cluster.hosts.problems() is None
    assert cluster.handle(Tick()) == []
    actions = cluster.handle(ExpectHosts(ExpectedHosts(("10.0.0.2", "10.0.0.3")), 60.0))
    assert CheckHost("n3") in actions
    cluster.handle(HostChecked("n3", CAPACITY))
    assert cluster.states["10.0.0.3"] == "joined"


def test_only_hosts_named_in_the_file_and_the_heads_are_used() -> None:
    cluster = Cluster(ExpectedHosts(()))
    cluster.join(HEAD, B)
    assert cluster.states == {"10.0.0.1": "joined", "10.0.0.2": "leaving"}
    assert {cluster.place(f"decode-{number}") for number in range(3)} == {"n1", None}
    (_, row) = cluster.hosts.status(cluster.now_s)
    assert row.message == "provider.worker_ips does not name it"


def test_a_suspected_host_gets_no_instance_until_it_has_answered() -> None:
    cluster = Cluster()
    cluster.join(B)
    assert cluster.place("decode-0") == "n2"
    assert cluster.handle(HostSuspected("n2")) == [CheckHost("n2")]
    assert "an instance there was lost" in (cluster.hosts.problems() or "")
    assert cluster.place("decode-1") is None
    assert cluster.handle(HostSuspected("n2")) == []
    cluster.handle(HostChecked("n2", Capacity(7)))
    assert cluster.hosts.places.next() is not None
    (row, _) = cluster.hosts.status(cluster.now_s)
    assert (row.num_cores, row.num_cores_taken, row.worker_ids) == (2, 2.0, ("decode-0", "decode-1"))


def test_a_host_reported_full_gets_no_instance_until_it_recovers() -> None:
    cluster = Cluster(ExpectedHosts(("10.0.0.2",)))
    cluster.join(HEAD, B)
    on = {cluster.place(f"decode-{number}"): f"decode-{number}" for number in range(3)}
    full = HostRefused("n2", "no space is left in /tmp")
    assert changes(cluster.handle(full)) == [("10.0.0.2", HostState.REFUSED)]
    assert cluster.hosts.problems() == "host 10.0.0.2: no space is left in /tmp"
    row = cluster.hosts.status(cluster.now_s)[1]
    assert on["n2"] in row.worker_ids, "what runs there goes on"
    cluster.place("decode-3")
    assert cluster.place("decode-4") is None
    for _ in range(10):
        assert cluster.handle(full, after_s=1.0) == []
    assert cluster.handle(Tick(), after_s=CHECK_AGAIN_S) == [CheckHost("n2")]
    assert changes(cluster.handle(full)) == [], "it is as full as before"
    cluster.handle(Tick(), after_s=CHECK_AGAIN_S)
    cluster.handle(HostChecked("n2", CAPACITY))
    assert cluster.states["10.0.0.2"] == "joined"
    assert cluster.place("decode-5") == "n2"


def test_a_host_that_leaves_is_not_refused() -> None:
    cluster = Cluster(ExpectedHosts(()))
    cluster.join(HEAD, B)
    assert cluster.handle(HostRefused("n2", "no space is left in /tmp")) == []
    assert cluster.states["10.0.0.2"] == "leaving"


def test_the_heads_own_host_is_never_suspected() -> None:
    cluster = Cluster(ExpectedHosts())
    cluster.join(HEAD)
    assert cluster.handle(HostSuspected("n1")) == []


def test_an_answer_that_comes_too_late_changes_nothing() -> None:
    cluster = Cluster()
    cluster.see(B)
    cluster.see()
    assert cluster.handle(HostChecked("n2", CAPACITY)) == []
    assert cluster.place("decode-0") is None


def test_missing_cloud_hosts_are_identified_by_node_type() -> None:
    cluster = Cluster(ExpectedHosts(node_types={"gpu": 2}))
    cluster.join(HEAD, SeenHost("n2", "10.0.0.2", "b", "gpu"))
    assert cluster.states == {"10.0.0.1": "joined", "10.0.0.2": "joined", "gpu (2 of 2)": "awaited"}


def test_hosts_are_complete_when_rays_autoscaler_starts_no_more() -> None:
    elastic = ExpectedHosts(node_types={"gpu": 1}, max_hosts=2)
    cluster = Cluster(elastic)
    cluster.join(HEAD, SeenHost("n2", "10.0.0.2", "b", "gpu"))
    assert not cluster.hosts.are_complete(elastic)
    cluster.join(HEAD, SeenHost("n2", "10.0.0.2", "b", "gpu"), SeenHost("n3", "10.0.0.3", "c", "gpu"))
    assert cluster.hosts.are_complete(elastic)


def test_a_configuration_can_be_asked_about_before_it_is_in_force() -> None:
    cluster = Cluster()
    cluster.join(HEAD, B)
    both, one = ExpectedHosts(("b", "c")), ExpectedHosts(("b",))
    assert (cluster.hosts.are_complete(both), cluster.hosts.are_complete(one)) == (False, True)
    assert cluster.hosts.serving(ExpectedHosts(())) == ("n1",)
    assert cluster.hosts.serving(both) == ("n1", "n2")


def test_a_new_head_counts_memory_that_running_workers_have_taken() -> None:
    cluster = Cluster(ExpectedHosts())
    need = Need(1, 1.0, num_bytes=3 << 30)
    cluster.hosts.places.ask(("decode-0", 1), Role.DECODE, need)
    cluster.hosts.places.cores.open("n1", Capacity(2, num_bytes=4 << 30))
    cluster.hosts.places.next()
    cluster.see(HEAD)
    cluster.handle(HostChecked("n1", Capacity(2, num_bytes=1 << 30)))
    (row,) = cluster.hosts.status(cluster.now_s)
    assert row.memory_bytes == 4 << 30


def test_a_host_is_asked_again_when_a_worker_ended_while_it_answered() -> None:
    cluster = Cluster(ExpectedHosts())
    cluster.hosts.places.ask(("decode-0", 1), Role.DECODE, Need(1, 1.0, num_bytes=3 << 30))
    cluster.hosts.places.cores.open("n1", Capacity(2, num_bytes=4 << 30))
    cluster.hosts.places.next()
    cluster.see(HEAD)
    cluster.hosts.places.give_back(("decode-0", 1))
    # measured before it ended
    assert cluster.handle(HostChecked("n1", Capacity(2, num_bytes=1 << 30))) == [CheckHost("n1")]
    cluster.handle(HostChecked("n1", Capacity(2, num_bytes=4 << 30)))
    (row,) = cluster.hosts.status(cluster.now_s)
    assert (row.state, row.memory_bytes) == (HostState.JOINED, 4 << 30)


@pytest.mark.parametrize("source", TRANSITIONS)
def test_no_host_makes_a_transition_outside_the_table(source: HostState) -> None:
    host = _Host(B, 0.0)
    if source is not host.state:
        host.enter(source, 0.0)
    for target in set(HostState) - TRANSITIONS[source]:
        with pytest.raises(InvalidTransition, match=r"host 10\.0\.0\.2"):
            host.transition(target, 1.0)
