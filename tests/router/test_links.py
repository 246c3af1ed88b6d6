"""Links between hosts are probed where no transfer has used them, and avoided while they are broken."""

from collections import Counter
from itertools import permutations

import msgspec

from pdserve.core.messages import Probed, Role
from pdserve.router.links import MAX_BACKOFF_S, MAX_PROBES, MAX_PROBES_OF_A_HOST, PROBE_AGAIN_S, Links
from pdserve.router.registered_worker import RegisteredWorker
from pdserve.router.registry import Registry

from .cluster import worker_info


def worker(worker_id: str, host: str) -> RegisteredWorker:
    role = Role(worker_id.partition("-")[0])
    info = worker_info(worker_id, role)
    address = msgspec.structs.replace(
        info.address, host_id=f"id of {host}", tcp_host=f"{host}.example", tcp_port=4000
    )
    return RegisteredWorker(msgspec.structs.replace(info, address=address, node=host), 0)


A, B, C = worker("prefill-0", "a"), worker("decode-0", "b"), worker("decode-1", "c")
ALSO_B = worker("decode-2", "b")
AT_A = worker("decode-3", "a")


def serving(*workers: RegisteredWorker) -> Registry:
    registry = Registry()
    for one in workers:
        registry.add(one.info)
    return registry


def probes(links: Links, registry: Registry, now_s: float) -> list[tuple[RegisteredWorker, RegisteredWorker]]:
    links.workers_changed()
    known = {one.worker_id: one for one in (A, B, C, ALSO_B, AT_A)}
    return [
        (known[source.worker_id], known[target.worker_id]) for source, target in links.probes(registry, now_s)
    ]


def answer(source: RegisteredWorker, target: RegisteredWorker, error: str = "") -> Probed:
    return Probed(
        worker_id=source.worker_id,
        incarnation=source.incarnation,
        target_worker_id=target.worker_id,
        target_incarnation=target.incarnation,
        error=error,
    )


def test_two_consecutive_failures_break_a_link_for_all_workers_of_both_hosts() -> None:
    links = Links()
    links.failed(A, B, "no answer within 5.0 s", 0.0)
    assert not links.avoids(A, B)
    links.worked(A, ALSO_B)
    links.failed(A, B, "no answer within 5.0 s", 1.0)
    assert not links.avoids(A, B)
    links.failed(A, ALSO_B, "no answer within 5.0 s", 2.0)
    assert links.avoids(A, B) and links.avoids(A, ALSO_B)
    assert not links.avoids(A, C)


def test_within_a_host_there_is_no_network_to_blame() -> None:
    links = Links()
    for _ in range(5):
        links.failed(A, AT_A, "the peer closed the connection", 0.0)
    assert not links.avoids(A, AT_A)


def test_a_broken_link_is_probed_with_backoff_and_retried_by_one_request() -> None:
    links, registry = Links(), serving(A, B)
    links.failed(A, B, "refused", 0.0)
    links.failed(A, B, "refused", 0.0)
    now_s = 0.0
    for backoff_s in (10.0, 20.0, 40.0, 80.0, MAX_BACKOFF_S, MAX_BACKOFF_S):
        assert (A, B) not in probes(links, registry, now_s + backoff_s - 0.1)
        now_s += backoff_s
        assert (A, B) in probes(links, registry, now_s)
        assert links.avoids(A, B), "it has not answered yet"
        links.probed(answer(A, B), now_s)
        assert not links.avoids(A, B)
        links.started(A, B, now_s)
        assert links.avoids(A, B), "one is enough to find out"
        links.failed(A, B, "refused", now_s)
    links.worked(A, B)
    links.started(A, B, now_s)
    assert not links.avoids(A, B)


def test_links_between_hosts_that_serve_are_probed_both_ways_and_once() -> None:
    links, registry = Links(), serving(A, AT_A, B)
    assert {(a.info.node, b.info.node) for a, b in probes(links, registry, 0.0)} == {("a", "b"), ("b", "a")}
    assert probes(links, registry, 0.0) == []
    registry.add(C.info)
    links.workers_changed()
    found = {(a.info.node, b.info.node) for a, b in probes(links, registry, 1.0)}
    assert found == {("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")}


def test_a_link_that_a_transfer_has_used_is_not_probed() -> None:
    links, registry = Links(), serving(A, B)
    links.worked(A, B)
    assert [(a.info.node, b.info.node) for a, b in probes(links, registry, 0.0)] == [("b", "a")]


def test_two_failed_probes_break_a_link_and_one_success_mends_it() -> None:
    links, registry = Links(), serving(A, B)
    for now_s in (0.0, PROBE_AGAIN_S):
        assert not links.avoids(A, B)
        assert (A, B) in probes(links, registry, now_s)
        links.probed(answer(A, B, "no answer within 3 s"), now_s)
    assert links.avoids(A, B) and not links.avoids(B, A)
    assert [text[:37] for text in links.problems(registry)] == ["KV does not get from host a to host b"]
    assert (A, B) in probes(links, registry, PROBE_AGAIN_S + 10.0)
    links.probed(answer(A, B), PROBE_AGAIN_S + 10.0)
    assert not links.avoids(A, B) and not list(links.problems(registry))


def test_a_probe_settles_whether_a_failed_transfer_was_the_links_fault() -> None:
    links, registry = Links(), serving(A, B)
    links.worked(A, B)
    links.failed(A, B, "no answer within 5.0 s", 0.0)
    assert (A, B) in probes(links, registry, PROBE_AGAIN_S)
    links.probed(answer(A, B, "no answer within 3 s"), PROBE_AGAIN_S)
    assert links.avoids(A, B)


def test_a_lost_workers_probe_is_repeated_by_another_worker() -> None:
    links, registry = Links(), serving(A, B, ALSO_B)
    (asked,) = [(a, b) for a, b in probes(links, registry, 0.0) if a == A]
    lost = registry.get(asked[1].worker_id)
    assert lost is not None
    registry.lose(lost)
    links.lost(lost)
    (again,) = [(a, b) for a, b in probes(links, registry, 0.0) if a == A]
    assert again[1] is not asked[1]
    links.probed(answer(A, lost, "refused"), 0.0)
    links.probed(answer(A, lost, "refused"), 0.0)
    assert not links.avoids(A, B), "what is said of the dead is not held against the link"


def test_the_problem_names_both_hosts_the_port_cause_and_fix() -> None:
    links, registry = Links(), Registry()
    links.failed(A, B, "prefill-0: no answer within 5.0 s", 0.0)
    links.failed(A, B, "no answer within 5.0 s", 0.0)
    registry.add(A.info)
    assert list(links.problems(registry)) == [], "nobody serves on the other host"
    registry.add(B.info)
    assert list(links.problems(registry)) == [
        "KV does not get from host a to host b (b.example:4000; no answer within 5.0 s): their workers are"
        " not paired; let all TCP between the hosts of the cluster through their firewalls"
    ]


def test_a_turn_begins_a_bounded_number_of_probes_and_all_links_are_probed_once() -> None:
    hosts = {f"decode-{number}": worker(f"decode-{number}", f"h{number}") for number in range(60)}
    registry, links = serving(*hosts.values()), Links()
    links.workers_changed()
    asked: list[tuple[str, str]] = []
    pending: list[tuple[RegisteredWorker, RegisteredWorker]] = []
    num_turns = 0
    while (begun := list(links.probes(registry, 1.0))) or pending:
        assert len(begun) <= MAX_PROBES
        num_turns += 1
        asked += [(source.worker_id, target.worker_id) for source, target in begun]
        pending += begun
        under_way = Counter(source.worker_id for source, _ in pending)
        assert max(under_way.values()) <= MAX_PROBES_OF_A_HOST
        if not begun:
            links.probed(answer(*pending.pop()), 1.0)
    assert sorted(asked) == sorted(permutations(hosts, 2))
    assert not list(links.probes(registry, 1e9))


def test_a_new_worker_of_a_known_host_causes_no_probe() -> None:
    registry, links = serving(A, B), Links()
    for pair in probes(links, registry, 0.0):
        links.probed(answer(*pair), 0.0)
    registry.add(ALSO_B.info)
    assert not probes(links, registry, 1.0)


def test_links_of_a_host_that_has_left_are_probed_again_when_it_returns() -> None:
    registry, links = serving(A, B), Links()
    for pair in probes(links, registry, 0.0):
        links.probed(answer(*pair), 0.0)
    registry.lose(registry.add(msgspec.structs.replace(B.info, incarnation=2)))
    assert not probes(links, registry, 1.0)
    registry.add(msgspec.structs.replace(B.info, incarnation=3))
    assert len(probes(links, registry, 2.0)) == 2
