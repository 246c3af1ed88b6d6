"""A model whose next token is a pure function of the KV really present in a sequence's blocks: wrong, stale
or foreign blocks show up as wrong tokens. Replaces the engine in tests of scheduling and transfers."""

import random
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pdserve.core.failures import FailureKind
from pdserve.core.messages import KVLayout, TransferAddress, TransferStats
from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.batch import Batch, CompletedStep, Launched, SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.kv_manager import KVManager
from pdserve.engine.token_masks import TokenMasks

VOCABULARY = 97
LAYOUT = KVLayout(1, 1, 8, "float32", 4, "chain")


def chain(previous: int, token_id: int) -> int:
    return hash((previous, token_id)) & 0xFFFFFFFF


def next_token(state: int, choice: int, index: int) -> int:
    return hash((state, choice, index)) % VOCABULARY


def expected_tokens(prompt: Seq[int], choice: int, num_tokens: int, eos: int | None = None) -> list[int]:
    """Returns the tokens that a choice must produce on any worker."""
    state = 0
    for token_id in prompt:
        state = chain(state, token_id)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens.append(next_token(state, choice, len(tokens)))
        if tokens[-1] == eos:
            break
        state = chain(state, tokens[-1])
    return tokens


@dataclass
class ChainEngine:
    """Block pool, manager, and a "cache" that holds each token's chain value in its slot."""

    num_blocks: int
    block_size: int = 4
    max_model_len: int = 64
    runs_ahead: bool = False
    cache: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        self.kv = KVManager(self.pool, self.max_model_len)

    def read(self, block_ids: Seq[int], position: int) -> int:
        return self.cache[block_ids[position // self.block_size], position % self.block_size]

    def write(self, block_ids: Seq[int], position: int, state: int) -> None:
        self.cache[block_ids[position // self.block_size], position % self.block_size] = state

    def copy(self, copies: Seq[tuple[int, int]]) -> None:
        for source, copy in copies:
            for offset in range(self.block_size):
                if (source, offset) in self.cache:
                    self.cache[copy, offset] = self.cache[source, offset]

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched:
        self.copy(batch.copies)
        states = [self._compute(chunk.sequence, chunk.start, chunk.end) for chunk in batch.chunks]
        if on_layer is not None:
            on_layer(0)
        if before_sampling is not None:
            before_sampling()
        return CompletedStep(
            [
                [
                    SampledToken(next_token(state, choice, chunk.sequence.num_output_tokens))
                    for choice in chunk.choices
                ]
                if chunk.sequence.may_sample
                else []
                for chunk, state in zip(batch.chunks, states, strict=True)
            ]
        )

    def _compute(self, seq, start: int, end: int) -> int:  # type: ignore[no-untyped-def]
        state = self.read(seq.block_ids, start - 1) if start else 0
        for position in range(start, end):
            state = chain(state, seq.token_ids[position])
            self.write(seq.block_ids, position, state)
        return state


def spec(
    name: str,
    prompt: Seq[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    eos: int | None = None,
    output: Seq[int] = (),
    attempt: int = 0,
    grammar: str = "",
    client: str = "",
) -> SequenceSpec:
    return SequenceSpec(
        transfer=TransferId(name, attempt),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, n=n, grammar=grammar),
        choices=tuple(range(n)),
        output_token_ids=tuple(output),
        eos_token_ids=() if eos is None else (eos,),
        client=client,
    )


class Wire:
    """Both ends of a transfer, delivered in an order drawn by `rng`; implements SendPort and ReceivePort."""

    def __init__(self, sender: ChainEngine, receiver: ChainEngine, rng: random.Random) -> None:
        self._sender, self._receiver, self._rng = sender, receiver, rng
        self._sends: dict[TransferId, Any] = {}  # None: it fails
        self._expects: dict[TransferId, tuple[tuple[int, ...], int, int] | None] = {}
        self.address = TransferAddress("decode-0", 1, "host", "name", "127.0.0.1", 1)

    # SendPort

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Seq[int], num_tokens: int
    ) -> None:
        assert target == self.address
        self._sends[transfer] = {
            "blocks": tuple(block_ids),
            "ready": set(),
            "num": num_tokens,
            "payload": None,
        }

    def extend(self, transfer: TransferId, block_ids: Seq[int]) -> None:
        if self._sends.get(transfer) is not None:
            self._sends[transfer]["blocks"] += tuple(block_ids)

    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None:
        if self._sends.get(transfer) is not None:
            self._sends[transfer]["ready"] |= set(range(token_start, token_end))

    def prefill_done(self, transfer: TransferId) -> None: ...

    def commit(self, transfer: TransferId, payload: bytes) -> None:
        if self._sends.get(transfer) is not None:
            assert self._sends[transfer]["ready"] == set(range(self._sends[transfer]["num"]))
            self._sends[transfer]["payload"] = payload

    # ReceivePort

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Seq[int],
        num_tokens: int,
        num_cached_tokens: int,
        num_source_ranks: int,
    ) -> None:
        self._expects[transfer] = (tuple(block_ids), num_tokens, num_cached_tokens)

    def cancel(self, transfer: TransferId) -> None:
        """Fails both sides' transfers (the peer is informed)."""
        tables: tuple[dict[TransferId, Any], ...] = (self._sends, self._expects)
        for table in tables:
            if transfer in table:
                table[transfer] = None

    def deliver(self, prefill, decode) -> bool:  # type: ignore[no-untyped-def]
        """Delivers one pending event; returns False when there is none."""
        events: list[Callable[[], None]] = []
        for transfer, send in self._sends.items():
            if send is None:
                events.append(partial(self._fail_send, transfer, prefill))
            elif send["payload"] is not None and self._expects.get(transfer) is not None:
                events.append(partial(self._finish, transfer, prefill, decode))
        for transfer, expect in self._expects.items():
            if expect is None:
                events.append(partial(self._fail_receive, transfer, decode))
        if not events:
            return False
        self._rng.choice(events)()
        return True

    def _finish(self, transfer: TransferId, prefill, decode) -> None:  # type: ignore[no-untyped-def]
        send, expected = self._sends.pop(transfer), self._expects.pop(transfer)
        assert expected is not None
        blocks, num_tokens, num_cached = expected
        for position in range(num_cached, num_tokens):
            self._receiver.write(blocks, position, self._sender.read(send["blocks"], position))
        decode.received(transfer, send["payload"])
        prefill.sent(transfer, TransferStats(0, 1, 0.0, 0.0, 0))

    def _fail_send(self, transfer: TransferId, prefill) -> None:  # type: ignore[no-untyped-def]
        del self._sends[transfer]
        prefill.send_failed(transfer, "cancelled", FailureKind.CANCELLED)

    def _fail_receive(self, transfer: TransferId, decode) -> None:  # type: ignore[no-untyped-def]
        del self._expects[transfer]
        decode.receive_failed(transfer, "cancelled", FailureKind.CANCELLED)


class LateMasks:
    """Implements MaskPort: the grammar permits every token, but answers only when `deliver` is called."""

    def __init__(self) -> None:
        self.num_tokens: dict[int, int] = {}
        self.due: list[int] = []

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None:
        assert grammar and key not in self.num_tokens
        self.num_tokens[key] = len(token_ids)
        self.due.append(key)

    def advance(self, key: int, token_id: int) -> None:
        assert key not in self.due, "a token was sampled without its mask"
        self.num_tokens[key] += 1
        self.due.append(key)

    def close(self, key: int) -> None:
        del self.num_tokens[key]

    def deliver(self, rng: random.Random, masks: TokenMasks) -> bool:
        """Delivers one mask; returns False when none is due."""
        if not self.due:
            return False
        key = self.due.pop(rng.randrange(len(self.due)))
        if key in self.num_tokens:
            masks.masked(key, self.num_tokens[key], b"")
        return True
