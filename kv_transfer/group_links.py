"""Makes the links that need a process group, of either kind."""

from .gloo import GlooLink
from .group_link import GroupLink
from .pair import Local


def group_link(local: Local, kind: str, rank: int, num_slots: int, slot_bytes: int) -> GroupLink:
    """Returns one rank of a link over a process group, not built yet."""
    timeout_s = local.config.build_timeout_s(kind)
    if kind == "gloo":
        return GlooLink(rank, local.host, num_slots, slot_bytes, timeout_s)
    from .nccl import NcclLink  # imports torch

    assert local.gpu is not None, "a greeting without a GPU is refused"
    return NcclLink(rank, local.host, num_slots, slot_bytes, timeout_s, local.gpu.device, local.on_stuck)
