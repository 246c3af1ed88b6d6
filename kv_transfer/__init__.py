"""Moves one request's KV blocks from a prefill worker (P) to a decode worker (D).

    P: send -> computed... -> prefill_done -> commit   D: expect -> on_received -> it is scheduled

`sender` and `receiver` decide, `endpoint` and the pairs around them carry out, `shm`, `cuda_ipc` and `gloo`
move the bytes."""

from .config import Membership, TransferConfig
from .counters import TransferCounters
from .endpoint import TransferEndpoint
from .interfaces import KVStore, TransferListener

__all__ = [
    "KVStore",
    "Membership",
    "TransferConfig",
    "TransferCounters",
    "TransferEndpoint",
    "TransferListener",
]
