"""Ranks meet in shared memory. Here they are threads of one process, each with a view of its own."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from pdserve.kernels.levels import LIBRARY_PATH
from pdserve.kernels.ranks import RankLost, RankMemory, Word
from tests.deadlines import WAIT_S

pytestmark = pytest.mark.skipif(not LIBRARY_PATH.exists(), reason="there are no native kernels")

T = TypeVar("T")
SLOT_BYTES = 256 << 10  # above the size from which ranks share the work of a sum


@contextmanager
def meeting(num_ranks: int, **sizes: int) -> Iterator[list[RankMemory]]:
    first = RankMemory.create(num_ranks, **({"slot_bytes": SLOT_BYTES} | sizes))
    ranks = [first, *(RankMemory.join(first.address, rank) for rank in range(1, num_ranks))]
    try:
        yield ranks
    finally:
        first.abort()
        for memory in ranks:
            memory.close()


def on_all(ranks: list[RankMemory], call: Callable[[RankMemory], T]) -> list[T]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def parts(num_ranks: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, generator=generator).to(dtype) for _ in range(num_ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_sum_is_taken_in_the_order_of_ranks_and_the_same_on_all(num_ranks: int, dtype: torch.dtype) -> None:
    with meeting(num_ranks) as ranks:
        for count in (1, 63, 1025, 40_000, 200_001):
            xs = parts(num_ranks, count, dtype)
            expected = xs[0].float()
            for x in xs[1:]:
                expected = expected + x.float()
            expected = expected.to(dtype)
            for summed in on_all(ranks, lambda memory, xs=xs: memory.all_reduce(xs[memory.rank], WAIT_S)):  # type: ignore[misc]
                assert torch.equal(summed, expected), count


def test_infinities_and_nans_stay_what_they_are() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -float("nan"), 3.4e38])
    with meeting(2) as ranks:
        for dtype in (torch.float32, torch.bfloat16):
            xs = [values.to(dtype), torch.zeros(5, dtype=dtype)]
            expected = values.to(dtype)
            for summed in on_all(ranks, lambda memory, xs=xs: memory.all_reduce(xs[memory.rank], WAIT_S)):  # type: ignore[misc]
                assert torch.equal(summed.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("num_rows", [1, 3, 700])
def test_gathered_columns_stand_side_by_side_on_rank_0(num_rows: int) -> None:
    widths = [251, 250, 251, 250]
    whole = torch.randn(num_rows, sum(widths))
    xs = [part.contiguous() for part in whole.split(widths, dim=1)]
    with meeting(4, slot_bytes=4096) as ranks:
        for _ in range(3):  # in both slots of a rank
            gathered = on_all(ranks, lambda memory: memory.gather(xs[memory.rank], widths, WAIT_S))
            assert torch.equal(gathered[0], whole)


def test_every_rank_gets_the_data_of_all() -> None:
    with meeting(4) as ranks:
        data = [bytes([rank]) * 100 for rank in range(4)]
        assert on_all(ranks, lambda memory: memory.exchange(data[memory.rank], WAIT_S)) == [data] * 4


def test_many_calls_in_a_row_mix_nothing_up() -> None:
    with meeting(4, slot_bytes=256) as ranks:

        def work(memory: RankMemory) -> list[float]:
            results = []
            for step in range(200):
                x = torch.full((step % 150 + 1,), float(memory.rank + step))
                results.append(float(memory.all_reduce(x, WAIT_S)[-1]))
                memory.gather(x[None], [len(x)] * 4, WAIT_S)
            return results

        assert on_all(ranks, work) == [[4.0 * step + 6 for step in range(200)]] * 4


def test_the_death_of_a_rank_ends_the_calls_of_all_others() -> None:
    with meeting(4) as ranks:

        def work(memory: RankMemory) -> str:
            if memory.rank == 2:
                memory.close()  # as the kernel does when a process ends
                return ""
            with pytest.raises(RankLost) as lost:
                memory.all_reduce(torch.zeros(10), WAIT_S)
            return str(lost.value)

        reasons = on_all(ranks, work)
    assert "rank 2 has died" in reasons
    assert set(reasons) <= {"", "rank 2 has died", "another rank has given up, or was ended"}


def test_a_rank_that_does_not_come_is_lost_after_the_deadline_and_ends_when_it_does() -> None:
    with meeting(2) as (first, second):
        with pytest.raises(RankLost, match="rank 1 did not come in time") as lost:
            first.all_reduce(torch.zeros(10), 0.01)
        assert lost.value.rank == 1
        second.all_reduce(torch.zeros(10), WAIT_S)  # the first one's part is there
        with pytest.raises(RankLost, match="given up"):
            second.all_reduce(torch.zeros(10), WAIT_S)


def test_an_abort_wakes_those_who_wait() -> None:
    with meeting(2) as (first, second):
        ended = threading.Event()

        def wait() -> None:
            with pytest.raises(RankLost, match="was ended"):
                second.wait(Word.COMMANDS_WRITTEN, 1, 0)
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        first.abort()
        assert ended.wait(WAIT_S)
        thread.join()


def test_a_rank_is_there_once() -> None:
    with (
        meeting(2) as (first, _),
        pytest.raises(RankLost, match="rank 1 is there already"),
    ):
        RankMemory.join(first.address, 1)


def test_a_rank_0_that_is_gone_is_reported_to_those_who_come_late() -> None:
    with meeting(2) as (first, _):
        address = first.address
    with pytest.raises(RankLost, match="rank 0 is gone"):
        RankMemory.join(address, 1)
