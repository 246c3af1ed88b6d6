"""The recently drawn tokens, on the device: the next step takes its inputs from them before the host knows
them."""

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
        self._places: list[dict[Sequence, int]] = [{} for _ in range(_NUM_STEPS)]

    def keep(self, chunks: list[ScheduledChunk], token_ids: torch.Tensor) -> None:
        """Records `token_ids`, int64 [N] on the device: those drawn for the chunks, one for each of their
        choices."""
        self._step = (self._step + 1) % _NUM_STEPS
        first, places, row = self._step * self._size, {}, 0
        for chunk in chunks:
            if (
                len(chunk.choices) == 1 and row < self._size
            ):  # a fresh fork's are known before its sibling sequences go on
                places[chunk.sequence] = first + row
            row += len(chunk.choices)
        self._places[self._step] = places
        kept = min(row, self._size)
        self._ids[first : first + kept].copy_(token_ids[:kept])

    def place_of(self, seq: Sequence) -> int:
        """Returns the place of the sequence's last token."""
        for back in range(_NUM_STEPS):
            place = self._places[self._step - back].get(seq)
            if place is not None:
                return place
        raise RuntimeError(f"{seq}: its last token is not on the device any more")

    def take(self, places: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """Returns int64 [N]: the tokens at `places` int64 [N], and those of `otherwise` where a place is
        KNOWN."""
        return take_drawn(places, otherwise, self._ids)
