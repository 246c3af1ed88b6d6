"""Messages between rank 0 and the others: in order, of any length, none lost."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pdserve.engine.parallel.group import Deadlines, RankGroup
from pdserve.engine.parallel.steps import FIRST_FREE_KIND
from pdserve.engine.parallel.stream import Message
from pdserve.kernels.levels import LIBRARY_PATH
from pdserve.kernels.ranks import RankLost, RankMemory
from tests.deadlines import WAIT_S

pytestmark = pytest.mark.skipif(not LIBRARY_PATH.exists(), reason="there are no native kernels")

KIND = FIRST_FREE_KIND


@contextmanager
def groups(num_ranks: int, step_s: float = WAIT_S) -> Iterator[list[RankGroup]]:
    """Rings of 1 KiB."""
    memory = RankMemory.create(num_ranks, slot_bytes=256, ring_bytes=1024)
    others = [RankMemory.join(memory.address, rank) for rank in range(1, num_ranks)]
    members = [RankGroup(each, Deadlines(step_s, WAIT_S)) for each in (memory, *others)]
    try:
        yield members
    finally:
        memory.abort()
        for member in members:
            member.close()


def messages(num: int, seed: int) -> list[Message]:
    rng = random.Random(seed)
    return [
        Message(KIND + i, bytearray(rng.randbytes(rng.choice((0, 1, 50, 1024, 5000))))) for i in range(num)
    ]


def test_all_ranks_get_all_messages_of_rank_0_in_order() -> None:
    sent = messages(60, seed=1)
    with groups(4) as (first, *others), ThreadPoolExecutor(4) as pool:
        received = [
            pool.submit(lambda led=group.led: [led.receive() for _ in sent])  # type: ignore[misc]
            for group in others
        ]
        for message in sent:
            first.send(message.kind, message.payload)
        assert [future.result() for future in received] == [sent] * 3


def test_rank_0_gets_all_messages_of_each_rank_in_order() -> None:
    sent = {rank: messages(40, seed=rank) for rank in (1, 2, 3)}
    with groups(4) as (first, *others), ThreadPoolExecutor(4) as pool:
        assert first.leader is not None
        for group in others:
            pool.submit(
                lambda group=group: [group.reply(*message) for message in sent[group.shard.rank]]  # type: ignore[misc]
            )
        received: dict[int, list[Message]] = {1: [], 2: [], 3: []}
        while sum(map(len, received.values())) < 120:
            for rank, message in first.leader.replies(WAIT_S):
                received[rank].append(message)
        assert received == sent


def test_rank_0_may_ask_without_waiting() -> None:
    with groups(2) as (first, second):
        assert first.leader is not None
        assert first.leader.replies(0.0) == []
        second.reply(KIND, b"done")
        assert first.leader.replies(0.0) == [(1, Message(KIND, bytearray(b"done")))]


def test_several_threads_may_send_at_once() -> None:
    with groups(2) as (first, second):
        assert second.led is not None
        threads = [
            threading.Thread(target=lambda i=i: [first.send(KIND, bytes([i]) * 700) for _ in range(20)])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        received = [second.led.receive().payload for _ in range(80)]
        for thread in threads:
            thread.join()
    assert sorted(received) == [bytearray([i]) * 700 for i in range(4) for _ in range(20)]


def test_a_rank_that_reads_nothing_is_lost_when_its_ring_is_full() -> None:
    with groups(2, step_s=0.01) as (first, _):
        first.send(KIND, bytes(1000))
        with pytest.raises(RankLost, match="rank 1 did not come in time"):
            first.send(KIND, bytes(1000))
