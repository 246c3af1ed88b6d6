"""The index of prefixes that workers hold: built from workers' reports alone, hence possibly stale. A hint,
never a promise."""

from collections.abc import Iterable, Sequence

from ..core.hashing import block_hashes

HASHED_AT_ONCE = 16  # blocks by which the search for the longest prefix advances


class PrefixChain:
    """The block hashes of one token sequence, computed lazily: an unknown prompt costs one hash."""

    def __init__(self, token_ids: Sequence[int], block_size: int, salt: str) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        self._salt = salt
        self._hashes: list[bytes] = []
        self.num_blocks = len(token_ids) // block_size

    def __getitem__(self, block: int) -> bytes:
        known = len(self._hashes)
        if block >= known:
            tokens = self._token_ids[known * self._block_size : (block + 1) * self._block_size]
            parent = self._hashes[-1] if self._hashes else None
            self._hashes += block_hashes(tokens, self._block_size, self._salt, parent)
        return self._hashes[block]


class PrefixIndex:
    """(block hash -> workers) and back. A worker that holds a block is assumed to hold those before it, as
    caches evict from the tail: so bisection finds the length of a cached prefix."""

    def __init__(self) -> None:
        self._holders: dict[
            bytes, dict[str, None]
        ] = {}  # dicts as ordered sets: placement must be reproducible
        self._blocks: dict[str, set[bytes]] = {}

    def update(self, worker_id: str, added: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Records the blocks that a worker's cache gained and lost in a step."""
        blocks = self._blocks.setdefault(worker_id, set())
        for block_hash in added:
            blocks.add(block_hash)
            self._holders.setdefault(block_hash, {})[worker_id] = None
        for block_hash in evicted:
            if block_hash in blocks:
                blocks.remove(block_hash)
                self._forget(worker_id, block_hash)

    def remove_worker(self, worker_id: str) -> None:
        """Removes a worker whose cache is gone."""
        for block_hash in self._blocks.pop(worker_id, ()):
            self._forget(worker_id, block_hash)

    def _forget(self, worker_id: str, block_hash: bytes) -> None:
        holders = self._holders[block_hash]
        del holders[worker_id]
        if not holders:
            del self._holders[block_hash]

    def longest(self, chain: PrefixChain) -> tuple[int, Iterable[str]]:
        """Returns the largest number of leading blocks of `chain` that any worker holds, and those
        workers."""
        # some worker holds `low` blocks; none holds more than `high`
        low, high, step = 0, chain.num_blocks, 1
        while low < high:  # an unknown prompt costs one hash, a known one few more than its cached blocks
            middle = min(low + step, high)
            if chain[middle - 1] in self._holders:
                low, step = middle, HASHED_AT_ONCE
            else:
                high, step = middle - 1, max(1, (middle - 1 - low) // 2)
        return low, self._holders[chain[low - 1]] if low else ()

    def cached_blocks(self, worker_id: str, chain: PrefixChain, limit: int) -> int:
        """Returns how many of the first `limit` blocks of `chain` the worker holds."""
        blocks = self._blocks.get(worker_id)
        if not blocks or not limit or chain[0] not in blocks:
            return 0
        if chain[limit - 1] in blocks:
            return limit
        low, high = 1, limit - 1
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in blocks:
                low = middle
            else:
                high = middle - 1
        return low
