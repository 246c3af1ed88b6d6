"""A transfer in parts has one end: committed once all parts are, failed once none is under way any more."""

import pytest
from hypothesis import given, strategies as st

from pdserve.core.failures import FailureKind
from pdserve.core.messages import TransferStats
from pdserve.core.request import TransferId
from pdserve.kv_transfer.parted import Failure, PartedTransfers, total

T = TransferId("request", 0)
LOST = Failure("gone", FailureKind.LOST)
CORRUPT = Failure("altered", FailureKind.CORRUPT)


class Ends:
    """Records what parted transfers command and report."""

    def __init__(self) -> None:
        self.aborted: list[tuple[int, Failure]] = []
        self.committed: list[list[str]] = []
        self.failed: list[Failure] = []
        self.parted: PartedTransfers[int, str] = PartedTransfers(
            lambda part, transfer, failure: self.aborted.append((part, failure)),
            lambda transfer, results: self.committed.append(results),
            lambda transfer, error, kind: self.failed.append(Failure(error, kind)),
        )
        self.begun: list[int] = []
        self.parted.open(T, range(3), self.begun.append)


def test_it_is_committed_with_the_last_of_its_parts() -> None:
    ends = Ends()
    ends.parted.committed(2, T, "c")
    ends.parted.committed(0, T, "a")
    assert not ends.committed
    ends.parted.committed(1, T, "b")
    assert ends.committed == [["a", "b", "c"]]
    assert not len(ends.parted)


def test_a_failed_part_aborts_the_others_and_the_end_waits_for_them() -> None:
    ends = Ends()
    ends.parted.committed(0, T, "a")
    ends.parted.failed(2, T, CORRUPT)
    assert ends.aborted == [(1, CORRUPT)]
    assert not ends.failed, "a part still reads or writes blocks"
    ends.parted.committed(1, T, "b")  # before the abort arrived
    assert ends.failed == [CORRUPT]
    assert not ends.committed


def test_an_abort_may_end_a_part_at_once() -> None:
    ends = Ends()
    parted: PartedTransfers[int, str] = PartedTransfers(
        lambda part, transfer, failure: parted.failed(part, transfer, LOST),
        lambda transfer, results: ends.committed.append(results),
        lambda transfer, error, kind: ends.failed.append(Failure(error, kind)),
    )
    parted.open(T, range(4), lambda part: None)
    parted.failed(1, T, CORRUPT)
    assert ends.failed == [CORRUPT]
    assert not len(parted)


@given(
    events=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([None, LOST, CORRUPT]), st.booleans()), max_size=30
    )
)
def test_whatever_parts_report_there_is_one_end(
    events: list[tuple[int, Failure | None, bool]],
) -> None:
    ends = Ends()
    over: dict[int, Failure | None] = {}  # the first end of each part
    for part, failure, is_known in events:
        transfer = T if is_known else TransferId("other", 0)
        if failure is None:
            ends.parted.committed(part, transfer, str(part))
        else:
            ends.parted.failed(part, transfer, failure)
        if is_known and part < 3:
            over.setdefault(part, failure)
    failures = [failure for failure in over.values() if failure is not None]
    assert len(ends.committed) + len(ends.failed) == (len(over) == 3)
    if len(over) == 3:
        assert ends.failed == failures[:1]


def test_nothing_is_open_after_a_close() -> None:
    ends = Ends()
    ends.parted.failed(1, T, CORRUPT)
    ends.parted.close("closed")
    assert ends.failed == [Failure("closed", FailureKind.LOST)]
    ends.parted.committed(0, T, "a")
    assert len(ends.failed) == 1


def test_parts_behind_one_that_fails_at_once_are_not_begun() -> None:
    ends, other, begun = Ends(), TransferId("other", 0), []

    def begin(part: int) -> None:
        begun.append(part)
        if part == 1:
            ends.parted.failed(part, other, CORRUPT)

    ends.parted.open(other, range(4), begin)
    assert begun == [0, 1]
    assert not ends.failed, "part 0 is under way"
    ends.parted.committed(0, other, "a")
    assert ends.failed == [CORRUPT]


def test_a_first_part_that_is_refused_leaves_nothing_open() -> None:
    ends, other = Ends(), TransferId("other", 0)

    def refuse(part: int) -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        ends.parted.open(other, range(4), refuse)
    assert len(ends.parted) == 1 and not ends.failed


def test_a_transfer_without_parts_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        Ends().parted.open(TransferId("other", 0), (), lambda part: None)


def test_the_cost_of_parts_side_by_side() -> None:
    costs = [TransferStats(100, 2, 0.5, 0.1, 60), TransferStats(50, 1, 0.7, 0.05, 0)]
    assert total(costs) == TransferStats(150, 3, 0.7, 0.1, 60)
    assert total(costs[:1]) == costs[0]
