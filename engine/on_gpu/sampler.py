"""Samples tokens from logits on a GPU, like `sampler.py`, without a wait for the device until the tokens are
read.

The host lists the sampling parameters of a step's rows while the device still computes them (`prepare`);
edits, draws and log probabilities are then queued behind the logits (`sample`), and the tokens stay on the
device, for the next step, and are copied to the host."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import torch

from ...kernels.sampling import SamplingBatch
from ...kernels.triton.sampling import sample
from ..batch import SampledToken, ScheduledChunk
from ..device import Device
from ..penalties import Penalties
from .draws import Draws
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
        self._draws = Draws(device, [], [], [])

    def prepare(self, chunks: Seq[ScheduledChunk], rows: Seq[int] | None = None) -> PreparedSampling:
        """Prepares to draw chunk i from row `rows[i]` of the logits, row i by default. A row belongs to one
        chunk."""
        in_order = list(range(len(chunks)))
        rows = in_order if rows is None else list(rows)
        sequences = [chunk.sequence for chunk in chunks]
        choices = [chunk.choices for chunk in chunks]
        draws = self._draws
        if (sequences, choices, rows) != (draws.sequences, draws.choices, draws.rows):
            draws = self._draws = Draws(self._device, sequences, choices, rows)
        arrays: dict[str, Array] = {}
        if draws.may_be_edited:
            for seq in sequences:
                assert not (seq.depends_on_tokens and seq.num_pending_tokens), (
                    f"{seq}: what may come next depends on a token that is not known"
                )
            arrays = list_edits(self._penalties, zip(rows, sequences, strict=True), self._vocab_size)
        if draws.takes_largest and rows == in_order:
            return PreparedSampling(tuple(chunks), send(self._device, arrays) | draws.raw, draws.num_top)
        arrays["index"] = draws.indices()
        there = send(self._device, arrays) | draws.columns | draws.raw
        return PreparedSampling(tuple(chunks), there, draws.num_top)

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
        drawn_ids = self._token_ids.tolist()
        if self._logprobs is None and len(drawn_ids) == len(self._chunks):
            return [[SampledToken(token_id)] for token_id in drawn_ids]
        token_ids = iter(drawn_ids)
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
