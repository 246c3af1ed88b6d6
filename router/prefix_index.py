"""The index of prefixes that workers hold: built from workers' reports alone, hence possibly stale. A hint,
never a promise."""

from collections.abc import Iterable, Iterator, Sequence

from ..core.hashing import block_hashes

HASHED_AT_ONCE = 16  # blocks by which the search for the longest prefix advances
NUM_SHARDS = 256  # dictionaries over which blocks are spread: with 5 million, one has 20,000


class PrefixChain:
    """The keys of one token sequence's blocks, computed lazily: an unknown prompt costs one hash."""

    def __init__(self, token_ids: Sequence[int], block_size: int, salt: str) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        self._salt = salt
        self._keys: list[int] = []
        self._parent: bytes | None = None  # the hash of the last block that is known
        self.num_blocks = len(token_ids) // block_size

    def __getitem__(self, block: int) -> int:
        known = len(self._keys)
        if block >= known:
            tokens = self._token_ids[known * self._block_size : (block + 1) * self._block_size]
            hashes = block_hashes(tokens, self._block_size, self._salt, self._parent)
            self._keys += block_keys(hashes)
            self._parent = hashes[-1]
        return self._keys[block]


class PrefixIndex:
    """Block -> workers. A worker that holds a block is assumed to hold those before it, as caches evict from
    the tail: so bisection finds the length of a cached prefix.

    A fleet caches millions of blocks, so an entry is small: a block is 60 bits of its hash, a set of workers
    an integer with a bit for each, one object for all blocks that the same workers hold. Python's garbage
    collector visits no dictionary of integers. No call takes long: blocks are spread over many dictionaries,
    as one that grows moves all that it holds, and those of a worker that is gone are swept out later, a
    dictionary with each update."""

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(NUM_SHARDS)]
        # each set of several workers that holds a block -> the object that is stored; and its blocks' number
        self._sets: dict[int, int] = {}
        self._num_uses: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._names: list[str] = []  # by number of the bit
        self._sets_of_one: list[int] = []  # likewise, the object that is stored
        self._live = 0  # the bits of present workers
        self._free: list[int] = []  # numbers of bits that no block has
        self._gone = 0  # bits of removed workers, to be swept out next
        self._swept = 0  # likewise, being swept out now
        self._next_shard = 0  # of the sweep

    def update(self, worker_id: str, added: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Records the blocks that a worker's cache gained and lost in a step."""
        self._sweep()
        bit = self._bits.get(worker_id) or self._assign_bit(worker_id)
        shards = self._shards
        for key in block_keys(added):
            shard = shards[key % NUM_SHARDS]
            holders = shard.get(key)
            if holders is None:
                shard[key] = bit
            elif not holders & bit:
                self._replace(shard, key, holders, holders | bit)
        for key in block_keys(evicted):
            shard = shards[key % NUM_SHARDS]
            holders = shard.get(key)
            if holders == bit:
                del shard[key]
            elif holders is not None and holders & bit:
                self._replace(shard, key, holders, holders & ~bit)

    def remove_worker(self, worker_id: str) -> None:
        """Removes a worker whose cache is gone, or will be reported anew."""
        bit = self._bits.pop(worker_id, 0)
        self._live &= ~bit
        self._gone |= bit
        self._sweep()

    def blocks_of(self, worker_id: str) -> set[int]:
        """Returns the keys of a worker's blocks. Looks at all blocks."""
        bit = self._bits.get(worker_id, 0)
        return {key for shard in self._shards for key, holders in shard.items() if holders & bit}

    def _assign_bit(self, worker_id: str) -> int:
        if not self._free:
            self._free.append(len(self._names))
            self._names.append("")
            self._sets_of_one.append(1 << len(self._sets_of_one))
        number = self._free.pop()
        self._names[number] = worker_id
        bit = self._bits[worker_id] = self._sets_of_one[number]
        self._live |= bit
        return bit

    def _replace(self, shard: dict[int, int], key: int, old: int, new: int) -> None:
        if not new:
            del shard[key]
        elif _is_several(new):
            shard[key] = self._sets.setdefault(new, new)
            self._num_uses[new] = self._num_uses.get(new, 0) + 1
        else:
            shard[key] = self._sets_of_one[new.bit_length() - 1]
        if _is_several(old):
            self._num_uses[old] -= 1
            if not self._num_uses[old]:
                del self._num_uses[old], self._sets[old]

    def _sweep(self) -> None:
        """Takes the removed workers out of one dictionary."""
        if not self._swept:
            self._swept, self._gone, self._next_shard = self._gone, 0, 0
        if not self._swept:
            return
        shard = self._shards[self._next_shard]
        for key, holders in [entry for entry in shard.items() if entry[1] & self._swept]:
            self._replace(shard, key, holders, holders & ~self._swept)
        self._next_shard += 1
        if self._next_shard == NUM_SHARDS:
            self._free += _numbers(self._swept)
            self._swept = 0

    def _holders(self, key: int) -> int:
        return self._shards[key % NUM_SHARDS].get(key, 0) & self._live

    def longest(self, chain: PrefixChain) -> tuple[int, Iterable[str]]:
        """Returns the largest number of leading blocks of `chain` that any worker holds, and those
        workers."""
        # some worker holds `low` blocks; none holds more than `high`
        low, high, step = 0, chain.num_blocks, 1
        holders = 0  # of `low` blocks
        while low < high:  # an unknown prompt costs one hash, a known one few more than its cached blocks
            middle = min(low + step, high)
            if found := self._holders(chain[middle - 1]):
                low, step, holders = middle, HASHED_AT_ONCE, found
            else:
                high, step = middle - 1, max(1, (middle - 1 - low) // 2)
        return low, (self._names[number] for number in _numbers(holders))

    def cached_blocks(self, worker_id: str, chain: PrefixChain, limit: int) -> int:
        """Returns how many of the first `limit` blocks of `chain` the worker holds."""
        bit = self._bits.get(worker_id, 0)
        if not bit or not limit or not self._holders(chain[0]) & bit:
            return 0
        if self._holders(chain[limit - 1]) & bit:
            return limit
        low, high = 1, limit - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._holders(chain[middle - 1]) & bit:
                low = middle
            else:
                high = middle - 1
        return low


def block_keys(hashes: Iterable[bytes]) -> list[int]:
    """Returns what the index knows of hashes: blocks that it takes for the same are one in 10^18."""
    from_bytes = int.from_bytes
    return [from_bytes(block_hash[:8], "little") >> 4 for block_hash in hashes]


def _is_several(bits: int) -> bool:
    return bits & (bits - 1) != 0


def _numbers(bits: int) -> Iterator[int]:
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1
