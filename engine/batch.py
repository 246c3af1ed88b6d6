"""The input and output of one step: the values that pass between a scheduler and the model runner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ..core.messages import StepTiming, TokenLogprobs
from .kv_manager import KVManager
from .sequence import Sequence


class ScheduledChunk(msgspec.Struct, frozen=True):
    """The next `num_tokens` uncomputed tokens of a sequence. Its blocks cover them already.

    `choices` lists the choices for which a token is sampled from the chunk's last position; empty when the
    chunk stops short of the sequence's end. Several choices are sampled from one row when a prompt is
    prefilled once for n > 1."""

    sequence: Sequence
    num_tokens: int
    choices: tuple[int, ...]
    start: int = 0  # always taken from the sequence, whose own number goes on

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "start", self.sequence.num_launched_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's chunks, and the block copies (source, destination) to be made before it (copy-on-write)."""

    chunks: tuple[ScheduledChunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    def timing(self, duration_s: float) -> StepTiming:
        """Returns the batch's shape, which the latency model pairs with the step's duration."""
        decodes = [chunk.start for chunk in self.chunks if chunk.num_tokens == 1]
        prefills = (
            [chunk for chunk in self.chunks if chunk.num_tokens > 1]
            if len(decodes) < len(self.chunks)
            else []
        )
        return StepTiming(
            num_prefill_tokens=sum(chunk.num_tokens for chunk in prefills),
            sum_prefill_squares=sum(chunk.num_tokens * chunk.end for chunk in prefills),
            num_decode_sequences=len(decodes),
            num_context_tokens=sum(decodes) + len(decodes),
            duration_s=duration_s,
        )


class SampledToken(msgspec.Struct, frozen=True):
    """One drawn token. Logprobs are of the model's own distribution, before temperature, penalties and
    filters."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token of choice 0, when requested


class Launched(Protocol):
    """A step under way."""

    def collect(self) -> list[list[SampledToken]]:
        """Waits for the step: one list of sampled tokens per chunk, one token per choice of the chunk."""
        ...


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that was done when it was launched."""

    sampled: list[list[SampledToken]]

    def collect(self) -> list[list[SampledToken]]:
        return self.sampled


class StepRunner(Protocol):
    """Computes batches, in the order in which they are launched.

    `on_layer(i)` is called when layer i is about to write, or has written, the batch's KV: later reads find
    it final. `before_sampling()` is called with the batch's computation done, when masks are missing; a chunk
    that still has none afterwards gets no token."""

    runs_ahead: (
        bool  # `launch` returns before the step is done, and takes sequences whose last token is pending
    )

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched: ...


@dataclass(frozen=True, slots=True)
class RoleEngine:
    """An engine as a worker's role drives it: its blocks, its steps, and how large these may be."""

    kv: KVManager
    runner: StepRunner
    num_layers: int
    max_batch_tokens: int
    max_batch_size: int
