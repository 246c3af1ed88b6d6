"""When a report of a worker has the queue looked at again."""

import pytest

from pdserve.core.messages import Leg, StepReport, WorkerLoad
from pdserve.core.request import FinishReason
from pdserve.router.config import RouterConfig
from pdserve.router.placement import Placer
from pdserve.router.waiting import REVIEW_S

from .cluster import BLOCK_SIZE, Cluster, make_request, worker_info


@pytest.fixture
def num_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each decision of the placer."""
    looks: list[int] = []
    original = Placer.place

    def place(self, job):  # type: ignore[no-untyped-def]
        looks.append(1)
        return original(self, job)

    monkeypatch.setattr(Placer, "place", place)
    return looks


def full_decode() -> Cluster:
    """One request decodes and has all blocks; another waits for them."""
    cluster = Cluster(
        worker_info("prefill-0", num_blocks=1000),
        worker_info("decode-0", num_blocks=20),
        config=RouterConfig(prefill_on_decode_factor=None),
    )
    cluster.submit(make_request("runs", 18 * BLOCK_SIZE))
    cluster.output("prefill-0", cluster.spec("decode-0").transfer, 0)
    cluster.submit(make_request("waits", 18 * BLOCK_SIZE, first_token=5000))
    return cluster


def report(cluster: Cluster, worker: str, num_free_blocks: int) -> None:
    load = WorkerLoad(num_free_blocks=num_free_blocks, num_running=1)
    cluster.handle(StepReport(worker_id=worker, incarnation=1, load=load))


def test_steps_that_free_nothing_do_not_place_what_waits(num_looks: list[int]) -> None:
    cluster = full_decode()
    report(cluster, "decode-0", 1)
    num_looks.clear()
    for _ in range(50):
        report(cluster, "decode-0", 1)
        report(cluster, "prefill-0", 900)
    assert not num_looks


def test_room_for_less_than_the_head_needs_is_no_reason_to_look(num_looks: list[int]) -> None:
    cluster = full_decode()
    report(cluster, "decode-0", 1)
    num_looks.clear()
    report(cluster, "decode-0", 5)
    assert not num_looks


def test_a_worker_that_reports_enough_free_blocks_gets_what_waits() -> None:
    cluster = full_decode()
    transfer = cluster.spec("decode-0").transfer
    cluster.output("decode-0", transfer, 1)
    report(cluster, "decode-0", 19)
    assert cluster.spec("decode-0").transfer.request_id == "waits"


def test_a_request_that_ends_makes_room_for_what_waits() -> None:
    cluster = full_decode()
    transfer = cluster.spec("decode-0").transfer
    cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=transfer)
    cluster.output("decode-0", transfer, 1, FinishReason.STOP)
    cluster.leg_ended("decode-0", Leg.DECODE, transfer=transfer)
    assert cluster.spec("decode-0").transfer.request_id == "waits"


def test_the_queue_is_reviewed_from_time_to_time(num_looks: list[int]) -> None:
    cluster = full_decode()
    num_looks.clear()
    cluster.now_s += REVIEW_S
    report(cluster, "prefill-0", 900)
    assert num_looks
