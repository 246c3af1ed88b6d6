"""BlockPool: a model that tracks every block, driven by random operations."""

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine.block_pool import BlockPool

NUM_BLOCKS = 8


def name(number: int) -> bytes:
    return number.to_bytes(2, "little")


class PoolMachine(RuleBasedStateMachine):
    """`holders` are lists of blocks with one reference each; `content` is the prefix that a block's cached
    hash promises."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16)
        self.holders: list[list[int]] = []
        self.index: set[bytes] = set()  # a router's view, built from events alone

    def _refs(self, block_id: int) -> int:
        return sum(blocks.count(block_id) for blocks in self.holders)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free_blocks
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None and self.pool.num_free_blocks == free
        else:
            assert blocks is not None and len(set(blocks)) == count
            assert not any(self._refs(block_id) for block_id in blocks)
            assert not any(self.pool.is_cached(block_id) for block_id in blocks)
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), number=st.integers(0, 12))
    def cache(self, data: st.DataObject, number: int) -> None:
        uncached = [b for blocks in self.holders for b in blocks if not self.pool.is_cached(b)]
        if uncached:
            before = self.pool.match_prefix([name(number)])
            block_id = data.draw(st.sampled_from(uncached))
            self.pool.cache(block_id, name(number))
            assert self.pool.match_prefix([name(number)]) == (before or [block_id])

    @rule(numbers=st.lists(st.integers(0, 12), max_size=4, unique=True))
    def share(self, numbers: list[int]) -> None:
        blocks = self.pool.match_prefix([name(number) for number in numbers])
        self.pool.acquire(blocks)
        self.holders.append(blocks)

    @rule()
    def report(self) -> None:
        added, evicted = self.pool.take_events()
        assert not self.index & set(added)
        assert self.index >= set(evicted)
        self.index = (self.index | set(added)) - set(evicted)
        assert {name(n) for n in range(13) if self.pool.match_prefix([name(n)])} == self.index

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        assert [self.pool.ref_count(b) for b in range(NUM_BLOCKS)] == [
            self._refs(b) for b in range(NUM_BLOCKS)
        ]
        assert self.pool.num_free_blocks == sum(not self._refs(b) for b in range(NUM_BLOCKS))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def cached_sequence(pool: BlockPool, numbers: list[int]) -> list[int]:
    blocks = pool.allocate(len(numbers))
    assert blocks is not None
    for block_id, number in zip(blocks, numbers, strict=True):
        pool.cache(block_id, name(number))
    return blocks


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(4, 16)
    pool.free(cached_sequence(pool, [1, 2, 3, 4]))
    pool.allocate(2)
    assert len(pool.match_prefix([name(n) for n in (1, 2, 3, 4)])) == 2


def test_the_least_recently_freed_prefix_is_evicted_first() -> None:
    pool = BlockPool(4, 16)
    old, new = cached_sequence(pool, [1, 2]), cached_sequence(pool, [3, 4])
    pool.free(old)
    pool.free(new)
    pool.acquire(old)
    pool.free(old)
    pool.allocate(2)
    assert pool.match_prefix([name(1), name(2)]) == old
    assert pool.match_prefix([name(3)]) == []


def test_uncached_blocks_are_taken_before_a_prefix_is_evicted() -> None:
    pool = BlockPool(4, 16)
    pool.free(cached_sequence(pool, [1, 2]))
    pool.allocate(2)
    assert len(pool.match_prefix([name(1), name(2)])) == 2


def test_a_new_router_gets_the_present_cache_in_slices() -> None:
    pool = BlockPool(5, 16, max_reported=2)
    blocks = cached_sequence(pool, [1, 2, 3, 4, 5])
    while pool.num_unreported_blocks:
        pool.take_events()
    pool.free(blocks)
    pool.allocate(1)  # 5 is evicted, which the old router has yet to hear
    pool.report_anew()
    assert pool.num_unreported_blocks == 4
    assert pool.take_events() == ((name(1), name(2)), ())
    pool.allocate(3)
    assert pool.take_events() == ((), (name(2),)), "4 and 3 were never reported"
    assert pool.num_unreported_blocks == 0


def test_a_hash_evicted_and_cached_again_between_reports_is_not_reported() -> None:
    pool = BlockPool(1, 16)
    pool.free(cached_sequence(pool, [1]))
    assert pool.take_events() == ((name(1),), ())
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.cache(blocks[0], name(1))
    assert pool.take_events() == ((), ())


def test_freeing_an_unheld_block_raises() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError, match="not held"):
        pool.free([0])


@pytest.mark.parametrize("corrupt", ["_free", "_evictable"])
def test_the_integrity_check_finds_a_lost_block(corrupt: str) -> None:
    pool = BlockPool(4, 16)
    pool.free(cached_sequence(pool, [1]))
    getattr(pool, corrupt).pop(*([] if corrupt == "_free" else [0]))
    with pytest.raises(AssertionError):
        pool.check_integrity()
