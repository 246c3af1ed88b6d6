"""Gives sequences their blocks: cached prefixes at admission, room as they grow, sharing between choices.
Pure; both schedulers and the simulator use it.

A sequence's `block_ids` list only grows at its end; any other change replaces the list by a new one, so that
a component that mirrors it (the model runner's block table) detects changes by identity and length."""

from .block_pool import BlockPool
from .sequence import Sequence

# for the next token of a sequence: one behind its blocks, and a copy of a shared one
MAX_BLOCKS_A_TOKEN = 2


class KVManager:
    """The only writer of sequences' `block_ids`, `num_computed_tokens` and `num_cached_tokens`."""

    def __init__(self, pool: BlockPool, max_model_len: int) -> None:
        self.pool = pool
        self.max_model_len = max_model_len
        self._copies: dict[int, int] = {}  # destination -> source, in the order they were recorded

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def admit(self, seq: Sequence, use_cache: bool = True) -> int:
        """Acquires the cached prefix of a sequence that holds nothing; returns its number of tokens.

        At least the last token stays uncomputed, and cached blocks are never written: a prompt that is cached
        as a whole gives up its last block."""
        assert not seq.block_ids and seq.num_computed_tokens == 0, f"{seq} was admitted before"
        if use_cache:
            size = self.pool.block_size
            hashes = seq.block_hashes(size)[: (seq.num_tokens - 1) // size]
            seq.block_ids = self.pool.match_prefix(hashes)
            self.pool.acquire(seq.block_ids)
            seq.num_computed_tokens = len(seq.block_ids) * size
        seq.num_cached_tokens = seq.num_computed_tokens
        return seq.num_computed_tokens

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes tokens `[num_computed_tokens, num_tokens)` writable: blocks for all, and none of them shared.

        Returns False, without a change, when the pool has too few blocks. A shared block is replaced by a
        copy, see `take_copies`."""
        assert num_tokens <= self.max_model_len, f"{seq} would exceed {self.max_model_len} tokens"
        num_missing, shared = self._missing(seq, num_tokens)
        if not num_missing and shared is None:
            return True
        new = self.pool.allocate(num_missing + (shared is not None))
        if new is None:
            return False
        if shared is not None:
            self._copy_on_write(seq, shared, new.pop())
        seq.block_ids += new
        return True

    def num_blocks_to_grow(self, seq: Sequence, num_tokens: int) -> int:
        """Returns how many free blocks `grow` would take."""
        num_missing, shared = self._missing(seq, num_tokens)
        return num_missing + (shared is not None)

    def _missing(self, seq: Sequence, num_tokens: int) -> tuple[int, int | None]:
        """Returns how many blocks a sequence lacks for `num_tokens` tokens, and which of its own must be
        replaced because it is shared."""
        size, num_blocks = self.pool.block_size, len(seq.block_ids)
        num_missing = -(-num_tokens // size) - num_blocks if num_tokens > num_blocks * size else 0
        first = seq.num_computed_tokens // size
        is_shared = first < num_blocks and self.pool.ref_count(seq.block_ids[first]) > 1
        return num_missing, first if is_shared else None

    def _copy_on_write(self, seq: Sequence, index: int, copy: int) -> None:
        shared = seq.block_ids[index]
        self._copies[copy] = shared
        self.pool.free([shared])
        seq.block_ids = [*seq.block_ids[:index], copy, *seq.block_ids[index + 1 :]]

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """Returns block copies (source, destination) since the last call, to be made in this order before the
        next step writes."""
        copies = tuple((source, copy) for copy, source in self._copies.items())
        self._copies.clear()
        return copies

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens now have KV; blocks that they filled enter the prefix cache."""
        self.received(seq, seq.num_computed_tokens + num_tokens)

    def received(self, seq: Sequence, num_tokens: int) -> None:
        """Tokens `[0, num_tokens)` now have KV, from whatever source; blocks that became full enter the
        prefix cache."""
        size, num_before = self.pool.block_size, seq.num_computed_tokens
        assert num_before <= num_tokens <= len(seq.token_ids), f"{seq}: {num_tokens}"
        assert num_tokens <= len(seq.block_ids) * size, f"{seq}: {num_tokens}"
        seq.num_computed_tokens = num_tokens
        if num_before // size < num_tokens // size:
            hashes = seq.block_hashes(size)
            for index in range(num_before // size, num_tokens // size):
                self.pool.cache(seq.block_ids[index], hashes[index])

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child`, made by `parent.fork`, share the blocks that hold KV; the first to write a shared
        block copies it."""
        assert not child.block_ids and child.num_computed_tokens == parent.num_computed_tokens, (
            f"{child}, {parent}"
        )
        child.block_ids = parent.block_ids[: self.num_blocks_for(parent.num_computed_tokens)]
        self.pool.acquire(child.block_ids)

    def release(self, seq: Sequence) -> None:
        """Releases the sequence's blocks; it must not take part in a step any more."""
        for block_id in seq.block_ids if self._copies else ():
            if self.pool.ref_count(block_id) == 1:
                self._copies.pop(block_id, None)  # no one will read it; its next owner's content must stay
        self.pool.free(seq.block_ids)
        seq.block_ids = []

    def reset(self, seq: Sequence) -> None:
        """Preempts: releases the blocks and forgets their computation. The tokens stay; `admit` starts it
        again."""
        self.release(seq)
        seq.num_computed_tokens = 0
        seq.num_cached_tokens = 0
