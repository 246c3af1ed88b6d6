"""The parameters of a step's draws. All but the tokens' indices stay on the device for as long as the same
sequences draw."""

from functools import cached_property

import numpy as np
import torch

from ...kernels.sampling import GREEDY_BELOW
from ..device import Device
from ..sequence import Sequence
from .packet import Array, send


class Draws:
    """For `sequences[i]` one draw for each of `choices[i]`, from row `rows[i]` of the logits."""

    def __init__(
        self, device: Device, sequences: list[Sequence], choices: list[tuple[int, ...]], rows: list[int]
    ) -> None:
        self.sequences, self.choices, self.rows = sequences, choices, rows
        self._device = device
        self._draws = [
            (row, seq, choice)
            for row, seq, own in zip(rows, sequences, choices, strict=True)
            for choice in own
        ]
        sampling = [seq.spec.sampling for seq in sequences]
        # whether `list_edits` may have something for one of them
        self.may_be_edited = any(seq.depends_on_tokens for seq in sequences) or any(
            one.logit_bias or one.min_tokens for one in sampling
        )
        # whether each row's largest logit is its token, and the only candidate
        self.takes_largest = len(self._draws) == len(rows) and all(
            one.temperature < GREEDY_BELOW for one in sampling
        )
        wanted = [one.logprobs for one in sampling if one.logprobs is not None]
        self.num_top = max(wanted, default=0)
        self.raw = send(device, self._raw_rows()) if wanted else {}

    def indices(self) -> Array:
        """Returns the column `index` of a SamplingBatch: it changes with every step."""
        return np.array([seq.num_output_tokens for _, seq, _ in self._draws], dtype=np.int32)

    @cached_property
    def columns(self) -> dict[str, torch.Tensor]:
        """The other columns of a SamplingBatch, on the device."""
        sampling = [seq.spec.sampling for _, seq, _ in self._draws]
        return send(
            self._device,
            {
                "rows": np.array([row for row, _, _ in self._draws], dtype=np.int32),
                "temperature": np.array([one.temperature for one in sampling], dtype=np.float64),
                "top_k": np.array([one.top_k for one in sampling], dtype=np.int32),
                "top_p": np.array([one.top_p for one in sampling], dtype=np.float64),
                "min_p": np.array([one.min_p for one in sampling], dtype=np.float64),
                "seed": np.array([one.seed for one in sampling], dtype=np.uint64).view(np.int64),
                "choice": np.array([choice for _, _, choice in self._draws], dtype=np.int32),
            },
        )

    def _raw_rows(self) -> dict[str, Array]:
        raw_rows: list[int] = []
        raw_of: list[int] = []
        for row, seq, own in zip(self.rows, self.sequences, self.choices, strict=True):
            wants = seq.spec.sampling.logprobs is not None
            raw_of += [len(raw_rows) if wants else 0] * len(own)
            if wants:
                raw_rows.append(row)
        return {"raw_rows": np.array(raw_rows, dtype=np.int64), "raw_of": np.array(raw_of, dtype=np.int64)}
