"""The index of prefixes that workers hold: built from workers' reports alone, hence possibly stale. A hint,
never a promise."""

from collections.abc import Iterable, Iterator, Sequence, Set

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
    caches evict from the tail: so bisection finds the length of a cached prefix.

    A set of workers is an integer with a bit for each, and dictionaries of bytes, integers and None are not
    visited by Python's garbage collector: a full collection takes no longer with millions of blocks."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._blocks: dict[str, dict[bytes, None]] = {}
        self._bits: dict[str, int] = {}
        self._names: list[str | None] = []  # by number of the bit; None: free

    def update(self, worker_id: str, added: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Records the blocks that a worker's cache gained and lost in a step."""
        bit = self._bits.get(worker_id) or self._assign_bit(worker_id)
        blocks, holders = self._blocks[worker_id], self._holders
        for block_hash in added:
            blocks[block_hash] = None
            holders[block_hash] = holders.get(block_hash, 0) | bit
        for block_hash in evicted:
            if block_hash in blocks:
                del blocks[block_hash]
                self._forget(block_hash, bit)

    def remove_worker(self, worker_id: str) -> None:
        """Removes a worker whose cache is gone, or will be reported anew."""
        bit = self._bits.pop(worker_id, 0)
        if not bit:
            return
        self._names[bit.bit_length() - 1] = None
        for block_hash in self._blocks.pop(worker_id):
            self._forget(block_hash, bit)

    def blocks_of(self, worker_id: str) -> Set[bytes]:
        return self._blocks.get(worker_id, {}).keys()

    def _assign_bit(self, worker_id: str) -> int:
        if None not in self._names:
            self._names.append(None)
        number = self._names.index(None)
        self._names[number] = worker_id
        self._blocks[worker_id] = {}
        bit = self._bits[worker_id] = 1 << number
        return bit

    def _forget(self, block_hash: bytes, bit: int) -> None:
        left = self._holders[block_hash] & ~bit
        if left:
            self._holders[block_hash] = left
        else:
            del self._holders[block_hash]

    def _workers(self, bits: int) -> Iterator[str]:
        while bits:
            number = (bits & -bits).bit_length() - 1
            name = self._names[number]
            assert name is not None, "a worker that is removed holds nothing"
            yield name
            bits &= bits - 1

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
        return low, self._workers(self._holders[chain[low - 1]]) if low else ()

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
