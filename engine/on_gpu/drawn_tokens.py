"""The recently drawn tokens, on the device: the next step takes its inputs from them before the host knows
them."""

from collections.abc import Sequence as Seq

import torch

from ...kernels.triton.drawn_tokens import take_drawn
from ..batch import ScheduledChunk
from ..device import Device
from ..sequence import Sequence

KNOWN = -1  # instead of a place, as in `take_drawn`: the host knows the token
# whose tokens are kept: a worker has at most two steps under way, and steps of the other role between them
_NUM_STEPS = 4


class DrawnTokens:
    """A ring of the last steps' tokens. A sequence's token can be found until `_NUM_STEPS` more steps have
    drawn theirs."""

    def __init__(self, device: Device, max_batch_size: int) -> None:
        self._size = max_batch_size
        self._ids = torch.zeros(_NUM_STEPS * max_batch_size, dtype=torch.int64, device=device.torch_device)
        self._step = 0
        self._rows: list[dict[Sequence, int]] = [{} for _ in range(_NUM_STEPS)]  # by step
        self._sequences: list[Sequence] = []  # of the last step, if it drew one token for each

    def keep(self, chunks: list[ScheduledChunk], token_ids: torch.Tensor) -> None:
        """Records `token_ids`, int64 [N] on the device: those drawn for the chunks, one for each of their
        choices."""
        rows = self._rows[self._step]
        self._step = (self._step + 1) % _NUM_STEPS
        sequences = [chunk.sequence for chunk in chunks]
        if len(token_ids) != len(sequences) or len(sequences) > self._size:
            rows, self._sequences = self._rows_of(chunks), []
        elif sequences != self._sequences:  # most steps draw for the sequences of the last one
            rows, self._sequences = {seq: row for row, seq in enumerate(sequences)}, sequences
        self._rows[self._step] = rows
        first, kept = self._step * self._size, min(len(token_ids), self._size)
        self._ids[first : first + kept].copy_(token_ids[:kept])

    def place_of(self, seq: Sequence) -> int:
        """Returns the place of the sequence's last token."""
        for back in range(_NUM_STEPS):
            step = (self._step - back) % _NUM_STEPS
            row = self._rows[step].get(seq)
            if row is not None:
                return step * self._size + row
        raise RuntimeError(f"{seq}: its last token is not on the device any more")

    def places_of(self, sequences: list[Sequence]) -> Seq[int]:
        """Returns the place of each sequence's last token, KNOWN where that is not pending."""
        if sequences == self._sequences and all(seq.num_pending_tokens for seq in sequences):
            first = self._step * self._size
            return range(first, first + len(sequences))
        return [self.place_of(seq) if seq.num_pending_tokens else KNOWN for seq in sequences]

    def _rows_of(self, chunks: list[ScheduledChunk]) -> dict[Sequence, int]:
        rows, row = {}, 0
        for chunk in chunks:
            if (
                len(chunk.choices) == 1 and row < self._size
            ):  # a fresh fork's are known before its sibling sequences go on
                rows[chunk.sequence] = row
            row += len(chunk.choices)
        return rows

    def take(self, places: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """Returns int64 [N]: the tokens at `places` int64 [N], and those of `otherwise` where a place is
        KNOWN."""
        return take_drawn(places, otherwise, self._ids)
