"""Ways between hosts that are broken are tried by one request at a time, and by all once they work."""

import msgspec

from pdserve.core.messages import Role
from pdserve.router.links import MAX_PAUSE_S, Links
from pdserve.router.registry import Registry, Worker

from .cluster import worker_info


def worker(worker_id: str, host: str) -> Worker:
    role = Role(worker_id.partition("-")[0])
    info = worker_info(worker_id, role)
    address = msgspec.structs.replace(info.address, host_id=f"id of {host}", tcp_host=f"{host}.example", tcp_port=4000)
    return Worker(msgspec.structs.replace(info, address=address, node=host), 0)


A, B, C = worker("prefill-0", "a"), worker("decode-0", "b"), worker("decode-1", "c")
ALSO_B = worker("decode-2", "b")
AT_A = worker("decode-3", "a")


def test_a_way_is_avoided_after_two_failures_in_a_row_for_all_workers_of_both_hosts() -> None:
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


def test_one_request_tries_it_again_after_pauses_that_double_and_all_do_once_it_works() -> None:
    links = Links()
    links.failed(A, B, "refused", 0.0)
    links.failed(A, B, "refused", 0.0)
    now_s = 0.0
    for pause_s in (10.0, 20.0, 40.0, 80.0, MAX_PAUSE_S, MAX_PAUSE_S):
        links.wake(now_s + pause_s - 0.1)
        assert links.avoids(A, B)
        now_s += pause_s
        links.wake(now_s)
        assert not links.avoids(A, B)
        links.started(A, B, now_s)
        assert links.avoids(A, B), "one is enough to find out"
        links.failed(A, B, "refused", now_s)
    links.worked(A, B)
    links.started(A, B, now_s)
    assert not links.avoids(A, B)


def test_the_operator_reads_both_hosts_the_port_the_cause_and_what_to_do() -> None:
    links, registry = Links(), Registry()
    links.failed(A, B, "prefill-0: no answer within 5.0 s", 0.0)
    links.failed(A, B, "no answer within 5.0 s", 0.0)
    registry.add(A.info)
    assert list(links.problems(registry)) == [], "nobody serves on the other host"
    registry.add(B.info)
    assert list(links.problems(registry)) == [
        "KV does not get from host a to host b (b.example:4000; no answer within 5.0 s): their workers are not paired; "
        "let all TCP between the hosts of the cluster through their firewalls"
    ]
