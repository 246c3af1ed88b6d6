"""The model and its KV in the simulator: a token is a pure function of the KV really present in the
sequence's blocks.

The KV of the token at position p is the chain value of tokens 0..p, once per layer and KV head; a head adds
its number, times a constant. A step sums, per layer and head, all the KV that its block table names; the sums
determine the token. So a wrong, stale, missing or foreign block, or head, shows as a wrong token."""

import zlib
from collections.abc import Callable, Sequence as Seq
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ..core.messages import KVLayout, TokenLogprobs
from ..core.request import TransferId
from ..engine.block_pool import BlockPool
from .virtual_time import VirtualTime

VOCABULARY = 997
NUM_LAYERS = 2
MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_HEAD_STEP = 0xC2B2AE3D27D4EB4F


def layout(block_size: int, num_kv_heads: int) -> KVLayout:
    """One 64-bit word per layer, head and token."""
    return KVLayout(NUM_LAYERS, num_kv_heads, 1, "float32", block_size, "chain")


def chain(state: int, token_id: int) -> int:
    state = ((state ^ (token_id + 1)) * _MULTIPLIER) & MASK
    return state ^ (state >> 29)


def sample(total: int, seed: int, choice: int, index: int) -> int:
    """Returns the token that a step draws: a function of KV, seed, choice and index alone."""
    return chain(chain(total ^ seed, choice), index) % VOCABULARY


def salted(salt: str) -> int:
    """Returns the start of a chain: KV of one cache salt is wrong for every other."""
    return zlib.crc32(salt.encode())


def expected_tokens(
    prompt: Seq[int], seed: int, choice: int, max_tokens: int, eos: int | None = None, salt: str = ""
) -> list[int]:
    """Returns the tokens that a choice must produce, regardless of workers and faults."""
    state, total = salted(salt), 0
    for token_id in prompt:
        state = chain(state, token_id)
        total = (total + state) & MASK
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(sample(total, seed, choice, len(tokens)))
        if tokens[-1] == eos:
            break
        state = chain(state, tokens[-1])
        total = (total + state) & MASK
    return tokens


def prompt_logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token_id))


class StoreFault(Exception):
    """The error that a store raises when a fault is drawn."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate["ChainStore", Arguments], Result]


def _may_only_fail_by_a_drawn_fault(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
    """Reports any other error of a store's method as a bug of ours; a retry would hide it from the client."""

    def call(self: "ChainStore", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except StoreFault:
            raise
        except Exception as error:  # passing it on as a failed transfer must not hide it
            self._violation(f"{method.__name__} failed: {error!r}")
            raise

    return call


class ChainStore:
    """Implements `kv_transfer.interfaces.KVStore`, and checks each read and write of a block for
    permission."""

    def __init__(
        self,
        pool: BlockPool,
        clock: "Clocks",
        violation: Callable[[str], None],
        fails: Callable[[], bool],
        heads: range,
    ) -> None:
        size = pool.num_blocks * pool.block_size
        self.layout = layout(pool.block_size, len(heads))
        self.leases: dict[TransferId, frozenset[int]] = {}  # blocks that a transfer may write
        self._pool = pool
        self._violation = violation
        self._fails = fails
        self._steps = [head * _HEAD_STEP for head in heads]
        num_planes = NUM_LAYERS * len(heads)  # [layers, heads]
        self._words = [[0] * size for _ in range(num_planes)]
        self._sums = [[0] * pool.num_blocks for _ in range(num_planes)]  # of each block's words
        self._final_s = [
            [0.0] * size for _ in range(NUM_LAYERS)
        ]  # when a running step has computed each word
        self._clock = clock

    def write(self, layer: int, block_id: int, offset: int, word: int, final_s: float = 0.0) -> None:
        """Writes a word, which no other reader may read before `final_s`."""
        for plane, step in enumerate(self._steps, layer * len(self._steps)):
            self._put(plane, block_id, offset, (word + step) & MASK)
        self._final_s[layer][block_id * self._pool.block_size + offset] = final_s

    def _put(self, plane: int, block_id: int, offset: int, word: int) -> None:
        words, index = self._words[plane], block_id * self._pool.block_size + offset
        self._sums[plane][block_id] += word - words[index]
        words[index] = word

    def check_writable(self, block_ids: Seq[int], whose: object) -> None:
        for block_id in block_ids:
            if self._pool.ref_count(block_id) != 1 or self._pool.is_cached(block_id):
                state = f"{self._pool.ref_count(block_id)} holders" + ", cached" * self._pool.is_cached(
                    block_id
                )
                self._violation(f"{whose} writes block {block_id}: {state}")

    def check_held(self, block_ids: Seq[int], whose: object) -> None:
        for block_id in block_ids:
            if self._pool.ref_count(block_id) == 0:
                self._violation(f"{whose} reads block {block_id}, which has no holder")

    def totals(self, block_ids: Seq[int], num_tokens: int) -> list[int]:
        """Returns the sum over the first `num_tokens` tokens of a block table, for each layer and head; all
        are the same."""
        size = self._pool.block_size
        num_full = num_tokens // size
        found = []
        for plane, sums in enumerate(self._sums):
            total = sum([sums[block_id] for block_id in block_ids[:num_full]])
            if num_tokens % size:
                start = block_ids[num_full] * size
                total += sum(self._words[plane][start : start + num_tokens % size])
            found.append((total - num_tokens * self._steps[plane % len(self._steps)]) & MASK)
        return found

    def word(self, block_ids: Seq[int], position: int) -> int:
        """Returns the chain value at a position."""
        size = self._pool.block_size
        word = self._words[0][block_ids[position // size] * size + position % size]
        return (word - self._steps[0]) & MASK

    def copy_block(self, source: int, copy: int) -> None:
        size = self._pool.block_size
        for plane, words in enumerate(self._words):
            words[copy * size : (copy + 1) * size] = words[source * size : (source + 1) * size]
            self._sums[plane][copy] = self._sums[plane][source]

    # KVStore

    def mark(self) -> int:
        return 0  # `_final_s` holds the time when a step's words are there

    @_may_only_fail_by_a_drawn_fault
    def gather(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Seq[int],
        token_start: int,
        token_end: int,
        out: memoryview,
        after: int = 0,
        heads: range | None = None,
    ) -> int:
        if self._fails():
            raise StoreFault
        size = self._pool.block_size
        self.check_held(block_ids[token_start // size : -(-token_end // size)], "a transfer")
        words, now_s = out.cast("Q"), self._clock.time.now_s
        index = 0
        for layer, plane in self._planes(layer_start, layer_end, heads):
            for position in range(token_start, token_end):
                cell = block_ids[position // size] * size + position % size
                words[index] = self._words[plane][cell]
                if self._final_s[layer][cell] > now_s:
                    self._violation(
                        f"a transfer reads layer {layer} of token {position} before it is computed"
                    )
                index += 1
        return zlib.crc32(out)

    def checksum(self, data: memoryview) -> int:
        return zlib.crc32(data)

    @_may_only_fail_by_a_drawn_fault
    def scatter(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Seq[int],
        token_start: int,
        token_end: int,
        data: memoryview,
        after: int = 0,
        heads: range | None = None,
    ) -> None:
        if self._fails():
            raise StoreFault
        size = self._pool.block_size
        touched = block_ids[token_start // size : -(-token_end // size)]
        if not any(blocks.issuperset(touched) for blocks in self.leases.values()):
            self._violation(f"a transfer writes blocks {list(touched)} after its lease")
        self.check_writable(touched, "a transfer")
        words = data.cast("Q")
        index = 0
        for layer, plane in self._planes(layer_start, layer_end, heads):
            for position in range(token_start, token_end):
                block_id, offset = block_ids[position // size], position % size
                self._put(plane, block_id, offset, words[index])
                self._final_s[layer][block_id * size + offset] = 0.0
                index += 1

    def _planes(self, layer_start: int, layer_end: int, heads: range | None) -> list[tuple[int, int]]:
        """Returns (layer, plane) of these layers and heads, in the order of the wire."""
        num_heads = len(self._steps)
        picked = range(num_heads) if heads is None else heads
        return [
            (layer, layer * num_heads + head) for layer in range(layer_start, layer_end) for head in picked
        ]


class Clocks(Protocol):
    """The clocks that the store needs."""

    @property
    def time(self) -> VirtualTime: ...
