"""The masks of sequences that follow a grammar: requested as soon as a token is known, and available when the
next is drawn.

Meanwhile the next step is computed. A sequence whose mask is late gets no token in it, and computes its last
token again when the mask has arrived (`Sequence.num_computable_tokens`)."""

import itertools
from collections.abc import Callable, Iterable, Sequence as Seq
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..core.request import TransferId
from .sequence import Sequence

AwaitMasks = Callable[[Seq[Sequence]], None]  # returns when all of these have their masks, or after a moment


class MaskPort(Protocol):
    """The path to the grammar processes; every call returns at once. Answers arrive at `Worker.masked` and
    `mask_failed`."""

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None: ...
    def advance(self, key: int, token_id: int) -> None: ...
    def close(self, key: int) -> None: ...


class NoGrammars:
    """The port of a worker that receives no sequences with a grammar."""

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], client: str) -> None:
        raise AssertionError("there is no grammar process")

    def advance(self, key: int, token_id: int) -> None:
        raise AssertionError("there is no grammar process")

    def close(self, key: int) -> None:
        raise AssertionError("there is no grammar process")


class TokenMasks:
    """Owned by the engine thread."""

    def __init__(self, port: MaskPort) -> None:
        self._port = port
        self._keys = itertools.count()
        self._key_of: dict[Sequence, int] = {}
        self._sequence_of: dict[int, Sequence] = {}

    @property
    def is_empty(self) -> bool:
        """Returns whether no sequence here follows a grammar."""
        return not self._key_of

    def want(self, seq: Sequence) -> None:
        """`seq` is new here, or has one more token: requests the mask of its next one, if it follows a
        grammar."""
        grammar = seq.spec.sampling.grammar
        if not grammar:
            return
        key = self._key_of.get(seq)
        if key is None:
            key = self._key_of[seq] = next(self._keys)
            self._sequence_of[key] = seq
            self._port.open(key, grammar, tuple(seq.output_token_ids), seq.spec.client)
        else:
            self._port.advance(key, seq.token_ids[-1])

    def masked(self, key: int, num_tokens: int, bits: bytes) -> None:
        """Stores the mask of the token after `num_tokens` of the output."""
        seq = self._sequence_of.get(key)
        if seq is not None:
            assert num_tokens == seq.num_output_tokens, f"{seq}: mask after {num_tokens} output tokens"
            seq.token_mask = bits

    def given_up(self, key: int) -> TransferId | None:
        """The mask is unavailable. Returns the sequence that waits for it; None when it is gone."""
        seq = self._sequence_of.get(key)
        return None if seq is None else seq.transfer

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """The sequences no longer sample."""
        for seq in sequences:
            key = self._key_of.pop(seq, None)
            if key is not None:
                del self._sequence_of[key]
                self._port.close(key)

    def forget_all(self, transfer: TransferId) -> None:
        """Returns all sequences of a dispatch."""
        self.forget([seq for seq in self._key_of if seq.transfer == transfer])


def allowed_bits(seq: Sequence, vocab_size: int) -> npt.NDArray[np.uint8] | None:
    """Returns uint8 [ceil(vocab_size / 8)]: which tokens may come next by the sequence's grammar, the first
    in the lowest bit; None when it follows none. Bits behind the last token are undefined."""
    if seq.token_mask is None:
        return None
    length = -(-vocab_size // 8)
    given = np.frombuffer(seq.token_mask, dtype=np.uint8)[:length]
    if len(given) == length:
        return given
    bits = np.zeros(length, dtype=np.uint8)  # a model may have more tokens than its vocabulary
    bits[: len(given)] = given
    return bits


def unpacked(bits: npt.NDArray[np.uint8], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Returns `allowed_bits` as bool [vocab_size]."""
    return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)
