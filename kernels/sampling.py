"""The input of a sampler on the GPU, and its meaning in plain torch."""

from dataclasses import dataclass, fields

import torch

from .random_numbers import uniform

GREEDY_BELOW = 1e-5  # a lower temperature takes the largest logit
_DTYPES = {
    "rows": torch.int32,
    "temperature": torch.float64,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seed": torch.int64,
    "choice": torch.int32,
    "index": torch.int32,
}


@dataclass(frozen=True)
class SamplingBatch:
    """N draws, each from a row of the logits; several may share one. `core.request.SamplingParams` defines
    the parameters; a random number is a function of (seed, choice, index) alone. Draws of a negative row are
    padding."""

    rows: torch.Tensor  # int32 [N]
    temperature: torch.Tensor  # float64 [N]
    top_k: torch.Tensor  # int32 [N]; 0: off
    top_p: torch.Tensor  # float64 [N]; 1: off
    min_p: torch.Tensor  # float64 [N]; 0: off
    seed: torch.Tensor  # int64 [N]: the bits of an unsigned number
    choice: torch.Tensor  # int32 [N], not negative
    index: torch.Tensor  # int32 [N], not negative: of the token among its choice's

    def __post_init__(self) -> None:
        shape = self.rows.shape
        for name, dtype in _DTYPES.items():
            given = getattr(self, name)
            if given.dtype != dtype or given.shape != shape or given.dim() != 1 or not given.is_contiguous():
                expected = f"contiguous {dtype} [{self.rows.numel()}]"
                raise ValueError(f"{name}: {given.dtype} {tuple(given.shape)} given, expected {expected}")

    def to(self, device: str) -> "SamplingBatch":
        return SamplingBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def column_dtype(name: str) -> torch.dtype:
    """The dtype of a SamplingBatch's column."""
    return _DTYPES[name]


def check_logits(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"logits: {logits.dtype} {tuple(logits.shape)} given, expected contiguous float32 [R, V]"
        )


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Returns token ids int64 [N] from logits float32 [R, V], drawn as in `engine/distribution.py`:
    temperature, top-k, top-p and min-p in this order, then the first token by id whose cumulative weight
    exceeds the random share of the total."""
    check_logits(logits)
    out = torch.zeros(batch.rows.shape, dtype=torch.int64)
    for n, row in enumerate(batch.rows.tolist()):
        if row >= 0:
            out[n] = _draw(logits[row], batch, n)
    return out


def _draw(logits: torch.Tensor, batch: SamplingBatch, n: int) -> int:
    largest, temperature = logits.max(), float(batch.temperature[n])
    if temperature < GREEDY_BELOW or not largest.isfinite():
        return int(logits.argmax())
    top_k, top_p, min_p = int(batch.top_k[n]), float(batch.top_p[n]), float(batch.min_p[n])
    weights = ((logits - largest) * torch.tensor(1.0 / temperature, dtype=torch.float32)).exp()
    order = logits.argsort(descending=True, stable=True)  # of equal logits the lower id first
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < len(logits):
        kept = logits >= logits[order[top_k - 1]]
    if top_p < 1.0:
        cumulative = torch.where(kept, weights, 0.0)[order].double().cumsum(0)
        count = int(torch.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        kept = torch.zeros_like(kept).index_fill_(0, order[:count], True)
    kept &= weights >= torch.tensor(min_p, dtype=torch.float32)
    cumulative = torch.where(kept, weights, 0.0).double().cumsum(0)
    share = uniform(*(int(t[n]) for t in (batch.seed, batch.choice, batch.index)))
    drawn = int(torch.searchsorted(cumulative, share * cumulative[-1], right=True))
    return min(drawn, int((kept & (weights > 0.0)).nonzero()[-1]))
