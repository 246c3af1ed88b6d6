"""Ranks that would load different models, or lay out their KV differently, refuse one another before any of
them loads anything."""

from hashlib import blake2b

import msgspec

from ...core.errors import ConfigError
from ...core.messages import KVLayout
from ..checkpoint import Checkpoint
from .group import RankGroup

_NUM_BYTES = 1024


class _Facts(msgspec.Struct, frozen=True):
    checkpoint: str  # digest of its files' sizes and samples, and of its tensors' names and shapes
    dtype: str
    block_size: int
    num_blocks: int | None
    max_model_len: int | None
    wire: str
    kernels: str


def agree(
    group: RankGroup,
    checkpoint: Checkpoint,
    layout: KVLayout,
    num_blocks: int | None,
    max_model_len: int | None,
    kernels: str,
) -> None:
    """Returns when all ranks have come with the same facts. Raises ConfigError, on every rank, where one of
    them differs from rank 0, RankLost where one does not come."""
    digest = blake2b(layout.model_fingerprint.encode(), digest_size=16)
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
    facts = _Facts(
        digest.hexdigest(), layout.dtype, layout.block_size, num_blocks, max_model_len, layout.wire, kernels
    )
    of_ranks = [
        msgspec.json.decode(data, type=_Facts)
        for data in group.exchange(msgspec.json.encode(facts).ljust(_NUM_BYTES))
    ]
    for rank, other in enumerate(of_ranks):
        for name in _Facts.__struct_fields__:
            mine, expected = getattr(other, name), getattr(of_ranks[0], name)
            if mine != expected:
                raise ConfigError(f"{name}: rank {rank} has {mine!r}, expected rank 0's {expected!r}")
