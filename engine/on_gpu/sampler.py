"""Samples tokens from logits on a GPU, like `sampler.py`, without a wait for the device until the tokens are
read.

The host lists the sampling parameters of a step's rows while the device still computes them (`prepare`);
edits, draws and log probabilities are then queued behind the logits (`sample`), and the tokens stay on the
device, for the next step, and are copied to the host."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import numpy as np
import torch

from ...kernels.sampling import GREEDY_BELOW, SamplingBatch
from ...kernels.triton.sampling import sample
from ..batch import SampledToken, ScheduledChunk
from ..device import Device
from ..penalties import Penalties, has_penalties
from .logit_edits import apply_edits, list_edits
from .logprobs import Logprobs, logprobs_of
from .packet import Array, send

_COLUMNS = [field.name for field in fields(SamplingBatch)]


@dataclass(frozen=True)
class PreparedSampling:
    """A step's chunks and their sampling parameters, on the device by the time its logits are. For one call
    of `sample`."""

    chunks: tuple[ScheduledChunk, ...]
    there: dict[str, torch.Tensor]  # by name: `list_edits`, the columns of a SamplingBatch, and:
    # raw_rows int64 [W]: the rows with log probabilities; raw_of int64 [N]: each draw's among these, any
    # where it wants none
    num_top: int


class DeviceSampler:
    """Draws the next token of every choice of every sampled row. Used by one thread, on its current
    stream."""

    def __init__(self, device: Device, vocab_size: int) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._penalties = Penalties()

    def prepare(self, chunks: Seq[ScheduledChunk], rows: Seq[int] | None = None) -> PreparedSampling:
        """Prepares to draw chunk i from row `rows[i]` of the logits, row i by default. A row belongs to one
        chunk."""
        for chunk in chunks:
            _check_known(chunk)
        in_order = rows is None or list(rows) == list(range(len(chunks)))
        rows = range(len(chunks)) if rows is None else rows
        sequences = [chunk.sequence for chunk in chunks]
        arrays = list_edits(self._penalties, zip(rows, sequences, strict=True), self._vocab_size)
        if not (in_order and all(_takes_largest(chunk) for chunk in chunks)):
            arrays |= _draws(chunks, rows)
        wanted = [chunk.sequence.spec.sampling.logprobs for chunk in chunks]
        if any(num_top is not None for num_top in wanted):
            arrays |= _raw_rows(chunks, rows)
        num_top = max((num_top for num_top in wanted if num_top is not None), default=0)
        return PreparedSampling(tuple(chunks), send(self._device, arrays), num_top)

    def sample(self, logits: torch.Tensor, prepared: PreparedSampling) -> "DeviceTokens":
        """Samples from contiguous float32 logits [R, V], which it overwrites."""
        there = prepared.there
        raw = logits.index_select(0, there["raw_rows"]) if "raw_rows" in there else None
        apply_edits(logits, there)
        if "rows" in there:
            token_ids = sample(logits, SamplingBatch(*(there[column] for column in _COLUMNS)))
        else:
            token_ids = logits[: len(prepared.chunks)].argmax(dim=-1)
        logprobs = None if raw is None else logprobs_of(raw, there["raw_of"], token_ids, prepared.num_top)
        return DeviceTokens(self._device, prepared.chunks, token_ids, logprobs)


class DeviceTokens:
    """A step's tokens: on the device as soon as they are drawn, and on their way to the host."""

    def __init__(
        self, device: Device, chunks: Seq[ScheduledChunk], token_ids: torch.Tensor, logprobs: Logprobs | None
    ) -> None:
        self.token_ids = token_ids  # int64 [N] on the device, in the order of chunks and their choices
        self._chunks = chunks
        # Torch takes pinned memory for what is copied so: nothing waits before `report`.
        self._token_ids = token_ids.to("cpu", non_blocking=True)
        self._logprobs = None if logprobs is None else logprobs.to("cpu", non_blocking=True)
        self._copied = device.event()
        self._copied.record()

    def report(self) -> list[list[SampledToken]]:
        """Returns the tokens of each chunk, one for each of its choices. Waits for them."""
        self._copied.synchronize()
        token_ids = iter(self._token_ids.tolist())
        if self._logprobs is None:
            return [[SampledToken(next(token_ids)) for _ in chunk.choices] for chunk in self._chunks]
        logprobs = iter(self._logprobs.chosen.tolist())
        best = zip(self._logprobs.top_ids.tolist(), self._logprobs.top.tolist(), strict=True)
        reported = []
        for chunk in self._chunks:
            drawn = [(next(token_ids), next(logprobs)) for _ in chunk.choices]
            num_top = chunk.sequence.spec.sampling.logprobs
            if num_top is None:
                reported.append([SampledToken(token_id) for token_id, _ in drawn])
            else:
                top = tuple(zip(*(best_of[:num_top] for best_of in next(best)), strict=True))
                reported.append([SampledToken(token_id, logprob, top) for token_id, logprob in drawn])
        return reported


def _check_known(chunk: ScheduledChunk) -> None:
    seq = chunk.sequence
    depends = has_penalties(seq.spec.sampling) or seq.spec.sampling.grammar
    assert not (depends and seq.num_pending_tokens), (
        f"{seq}: what may come next depends on a token that is not known"
    )


def _takes_largest(chunk: ScheduledChunk) -> bool:
    """Returns whether the row's largest logit is the token, and the only candidate."""
    return chunk.sequence.spec.sampling.temperature < GREEDY_BELOW and len(chunk.choices) == 1


def _draws(chunks: Seq[ScheduledChunk], rows: Seq[int]) -> dict[str, Array]:
    """Returns the columns of a SamplingBatch."""
    draws = [
        (row, chunk.sequence.spec.sampling, choice, chunk.sequence.num_output_tokens)
        for row, chunk in zip(rows, chunks, strict=True)
        for choice in chunk.choices
    ]
    return {
        "rows": np.array([row for row, _, _, _ in draws], dtype=np.int32),
        "temperature": np.array([sampling.temperature for _, sampling, _, _ in draws], dtype=np.float64),
        "top_k": np.array([sampling.top_k for _, sampling, _, _ in draws], dtype=np.int32),
        "top_p": np.array([sampling.top_p for _, sampling, _, _ in draws], dtype=np.float64),
        "min_p": np.array([sampling.min_p for _, sampling, _, _ in draws], dtype=np.float64),
        "seed": np.array([sampling.seed for _, sampling, _, _ in draws], dtype=np.uint64).view(np.int64),
        "choice": np.array([choice for _, _, choice, _ in draws], dtype=np.int32),
        "index": np.array([index for _, _, _, index in draws], dtype=np.int32),
    }


def _raw_rows(chunks: Seq[ScheduledChunk], rows: Seq[int]) -> dict[str, Array]:
    raw_rows: list[int] = []
    raw_of: list[int] = []
    for row, chunk in zip(rows, chunks, strict=True):
        wants = chunk.sequence.spec.sampling.logprobs is not None
        raw_of += [len(raw_rows) if wants else 0] * len(chunk.choices)
        if wants:
            raw_rows.append(row)
    return {"raw_rows": np.array(raw_rows, dtype=np.int64), "raw_of": np.array(raw_of, dtype=np.int64)}
