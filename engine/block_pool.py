"""Tracks which KV blocks are in use, which hold a cached prefix, and which may be taken. Pure bookkeeping;
the bytes are in KVCache.

Every block is in exactly one of three places:

    held       reference count > 0; by sequences. May be cached too, then it must not be written any more
    evictable  reference count 0 and cached; least recently freed first
    free       reference count 0 and not cached
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from itertools import islice

MAX_REPORTED = 1024  # hashes added, in one report: some 20 KB, and a millisecond of the router's time


class BlockPool:
    """Reference-counted blocks with a hashed prefix cache. Every operation is O(1) per block it names, except
    `report_anew`."""

    def __init__(self, num_blocks: int, block_size: int, max_reported: int = MAX_REPORTED) -> None:
        self.num_blocks = num_blocks
        self._max_reported = max_reported
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # hash -> block_id, held or evictable
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._added: dict[bytes, None] = {}  # not reported yet
        self._evicted: dict[bytes, None] = {}

    @property
    def num_free_blocks(self) -> int:
        """Returns how many blocks `allocate` can give now: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def cached_hashes(self) -> Set[bytes]:
        return self._cached.keys()

    @property
    def num_unreported_blocks(self) -> int:
        """Returns how many cached blocks `take_events` has yet to report."""
        return len(self._added)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def is_cached(self, block_id: int) -> bool:
        return self._hash_of[block_id] is not None

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Returns the blocks of the longest cached prefix of `hashes`. They may be evicted until they are
        acquired."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Takes one more reference to blocks that are held or evictable."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._evictable[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Returns `num_blocks` blocks with one reference each and undefined content; None, and no change,
        when there are fewer."""
        if num_blocks > self.num_free_blocks:
            return None
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Drops one reference to each block of a sequence, given head first. The tail is evicted before the
        head."""
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if self._hash_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._evictable[block_id] = None

    def cache(self, block_id: int, block_hash: bytes) -> None:
        """Offers a held block's content to later prefixes. A hash that is cached already keeps its first
        block."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
        if block_hash in self._cached:
            return
        assert self._hash_of[block_id] is None, f"block {block_id} is cached under another hash"
        self._cached[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        if block_hash in self._evicted:
            del self._evicted[block_hash]
        else:
            self._added[block_hash] = None

    def take_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Returns the net change of the prefix cache since the last call: hashes added, hashes evicted. Of
        many added ones, the rest comes with later calls."""
        added = tuple(islice(self._added, self._max_reported))
        if len(added) == len(self._added):
            self._added = {}
        for block_hash in added if self._added else ():
            del self._added[block_hash]
        evicted, self._evicted = tuple(self._evicted), {}
        return added, evicted

    def report_anew(self) -> None:
        """The whole cache is reported by later calls of `take_events`, to a router that knows nothing of
        it."""
        self._added, self._evicted = dict.fromkeys(self._cached), {}

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        block_hash = self._hash_of[block_id]
        assert block_hash is not None
        self._hash_of[block_id] = None
        del self._cached[block_hash]
        if block_hash in self._added:
            del self._added[block_hash]
        else:
            self._evicted[block_hash] = None
        return block_id

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is in exactly one place and the cache's two maps agree.
        O(num_blocks)."""
        free, evictable = set(self._free), set(self._evictable)
        held = {block_id for block_id, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert min(self._ref_counts, default=0) >= 0, "a reference count is negative"
        assert len(free) + len(evictable) + len(held) == self.num_blocks, "a block is lost or in two places"
        assert free | evictable | held == set(range(self.num_blocks)), "a block is lost or in two places"
        cached = {block_id for block_id, block_hash in enumerate(self._hash_of) if block_hash is not None}
        assert evictable == cached - held, "an evictable block is not cached, or a cached one not evictable"
        assert {self._hash_of[block_id]: block_id for block_id in cached} == self._cached, (
            "the cache's maps disagree"
        )
        assert not self._added.keys() & self._evicted.keys(), "a hash is reported both added and evicted"
