"""The control stream of one (P, D) pair, frame by frame, behind the handshake by which both know each other.

    P --CONNECT(epoch, layout)--------> D     D --PREPARE(ring), CONNECTED--> P      or REFUSED
    P <--------------MEET(key, value)-------------> D     between these two, where both ends build
    P --OFFER(num_tokens)-------------> D     D --ACCEPT(token_start, credits)--> P
    P --CHUNK(seq, slot, span, sum)---> D     D --ACK(seq)--> P              or NACK, and the link is closed
    P --COMMIT(payload)---------------> D     D --COMMITTED--> P
    P <--------------ABORT, HEARTBEAT-------------> D     D --UNNEEDED--> P, which closes an idle link

Where an instance has several ranks, each pair of ranks that hold the same heads has a stream and a link.

Every message carries its epoch, those of a transfer its id (request, attempt); those that do not fit are
dropped as stale."""

import msgspec

from ..core.failures import FailureKind
from ..core.messages import KVLayout
from ..core.request import TransferId
from .span import Span

PROTOCOL_VERSION = 9


class Connect(msgspec.Struct, frozen=True, tag=True, array_like=True, kw_only=True):
    """P's first frame: names both workers and their ranks, and states the layout of P's KV in all its ranks.
    The heads that travel follow from it: those that both ranks hold, see `parts`."""

    version: int
    source_worker_id: str
    source_incarnation: int
    target_worker_id: str
    target_incarnation: int
    epoch: int
    link: str  # one of `choice.LINKS`
    layout: KVLayout
    gpu: str = ""  # as in TransferAddress
    source_rank: int = 0
    num_source_ranks: int = 1
    target_rank: int = 0
    num_target_ranks: int = 1


class Prepare(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D's staging ring: `shm` sends its memory with this frame, `cuda_ipc` a handle of it; both ends of
    `gloo` and `nccl` have one."""

    epoch: int
    num_slots: int
    slot_bytes: int
    handle: bytes = b""


class Meet(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An entry for the other end while both build the link, see `meeting.py`."""

    epoch: int
    key: str
    value: bytes


class Connected(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D's side of the link is up."""

    epoch: int


class LinkRefused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D refuses this peer."""

    error: str


class LinkHeartbeat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    epoch: int


class LinkUnneeded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D has more links than it needs: P closes this one, unless it has a transfer. Only P closes unused
    links, as only P knows what it is about to offer."""

    epoch: int


class OfferTransfer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """P is about to have the KV of `num_tokens` tokens; layers, heads and dtype are the pair's."""

    epoch: int
    transfer: TransferId
    num_tokens: int


class Accept(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D has blocks; it wants tokens from `token_start` on, at most `credits` chunks under way."""

    epoch: int
    transfer: TransferId
    token_start: int
    credits: int


class KVChunk(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A chunk's announcement; its bytes are in, or on their way to, the ring slot."""

    epoch: int
    transfer: TransferId
    seq: int  # of the link, increasing
    slot: int
    span: Span
    num_bytes: int
    checksum: int  # `KVStore.checksum`, 64 bits


class Ack(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The chunk has been handled; its slot is free again."""

    epoch: int
    transfer: TransferId
    seq: int


class Commit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Every chunk has been announced."""

    epoch: int
    transfer: TransferId
    payload: bytes


class Committed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Every byte is verified and in D's blocks."""

    epoch: int
    transfer: TransferId


class Nack(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """D will not take this chunk (or this commit); the link is closed behind this frame."""

    epoch: int
    transfer: TransferId
    error: str
    kind: FailureKind


class AbortTransfer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One side has given this transfer up; the link stays."""

    epoch: int
    transfer: TransferId
    error: str
    kind: FailureKind


SenderMessage = Connect | Meet | OfferTransfer | KVChunk | Commit | AbortTransfer | LinkHeartbeat
ReceiverMessage = (
    Prepare
    | Meet
    | Connected
    | LinkRefused
    | LinkUnneeded
    | Accept
    | Ack
    | Committed
    | Nack
    | AbortTransfer
    | LinkHeartbeat
)
