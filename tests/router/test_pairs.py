"""A pair of workers between which transfers fail is paired last, though each works with others."""

from pdserve.router.pairs import AVOIDED_S, MAX_AVOIDED_S, NUM_FAILURES, Pairs
from pdserve.router.registered_worker import RegisteredWorker
from pdserve.router.registry import Registry

from .cluster import worker_info

NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def workers() -> list[RegisteredWorker]:
    registry = Registry()
    for name in NAMES:
        registry.add(worker_info(name))
    return [worker for name in NAMES if (worker := registry.get(name)) is not None]


def test_only_a_pair_whose_transfers_failed_in_a_row_is_avoided() -> None:
    pairs = Pairs()
    p0, p1, d0, d1 = workers()
    for now_s in range(NUM_FAILURES):
        pairs.failed(p0, d0, now_s, now_s)
        pairs.worked(p0, d1)
        pairs.worked(p1, d0)
    assert pairs.avoids(p0, d0)
    assert not any(pairs.avoids(*pair) for pair in ((p0, d1), (p1, d0), (p1, d1)))


def test_a_transfer_that_works_between_two_failures_clears_the_pair() -> None:
    pairs = Pairs()
    p0, _, d0, _ = workers()
    for now_s in range(3 * NUM_FAILURES):
        pairs.failed(p0, d0, now_s, now_s)
        pairs.worked(p0, d0)
    assert not pairs.avoids(p0, d0)


def test_dispatches_that_were_under_way_together_count_as_one_failure() -> None:
    pairs = Pairs()
    p0, _, d0, _ = workers()
    for _ in range(10):
        pairs.failed(p0, d0, dispatched_s=1.0, now_s=2.0)
    assert not pairs.avoids(p0, d0)


def test_an_avoided_pair_is_tried_by_one_dispatch_at_a_time_and_ever_more_rarely() -> None:
    pairs = Pairs()
    p0, _, d0, _ = workers()
    now_s, waits_s = 0.0, []
    for _ in range(NUM_FAILURES + 8):
        pairs.failed(p0, d0, now_s, now_s)
        since_s = now_s
        while pairs.avoids(p0, d0):
            now_s += AVOIDED_S
            pairs.review(now_s)
        waits_s.append(now_s - since_s)
        pairs.started(p0, d0, now_s)
        assert pairs.avoids(p0, d0) == (len(waits_s) >= NUM_FAILURES)
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] == MAX_AVOIDED_S


def test_a_lost_worker_takes_its_pairs_along() -> None:
    pairs = Pairs()
    p0, p1, d0, _ = workers()
    for now_s in range(NUM_FAILURES):
        pairs.failed(p0, d0, now_s, now_s)
        pairs.failed(p1, d0, now_s, now_s)
    pairs.lost(p0)
    assert not pairs.avoids(p0, d0)
    assert pairs.avoids(p1, d0)
    pairs.review(2 * AVOIDED_S)
    assert not pairs.avoids(p1, d0)
