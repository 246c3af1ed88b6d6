"""The events that a pair's two state machines receive, and the commands that they issue. The peer's messages
are events as they are."""

import msgspec

from ..core.failures import FailureKind
from ..core.messages import TransferStats
from ..core.request import TransferId
from .protocol import (
    AbortTransfer,
    Accept,
    Ack,
    Commit,
    Committed,
    KVChunk,
    LinkHeartbeat,
    LinkUnneeded,
    Nack,
    OfferTransfer,
)
from .span import Span


class TransferEvent(msgspec.Struct, frozen=True, tag=True):
    """Base of the events that the shell passes to a machine."""


class TransferTick(TransferEvent, frozen=True):
    """Time has passed."""


class LinkUp(TransferEvent, frozen=True):
    epoch: int
    link: str  # one of `choice.LINKS`
    num_slots: int
    slot_bytes: int


class LinkDown(TransferEvent, frozen=True):
    """The link of `epoch` has failed (None: it never came up)."""

    epoch: int | None
    error: str


class ReleaseLink(TransferEvent, frozen=True):
    """Our end can do without the link: it is closed, unless a transfer uses it."""


class PeerGone(TransferEvent, frozen=True):
    """The peer will not return, or we are closing."""

    error: str


class CancelTransfer(TransferEvent, frozen=True):
    transfer: TransferId
    error: str
    kind: FailureKind = FailureKind.CANCELLED  # else that of another part's failure


class OpenTransfer(TransferEvent, frozen=True):
    """P: a transfer begins; none of it need be computed yet."""

    transfer: TransferId
    block_ids: tuple[int, ...]
    num_tokens: int


class Extend(TransferEvent, frozen=True):
    """P: more blocks of the transfer's table."""

    transfer: TransferId
    block_ids: tuple[int, ...]


class PartComputed(TransferEvent, frozen=True):
    """P: a part is final behind the store's mark."""

    transfer: TransferId
    span: Span
    mark: int = 0


class PrefillDone(TransferEvent, frozen=True):
    transfer: TransferId


class CommitReady(TransferEvent, frozen=True):
    transfer: TransferId
    payload: bytes


class GatherFailed(TransferEvent, frozen=True):
    """The chunk was not sent."""

    epoch: int
    transfer: TransferId
    seq: int
    error: str


class Expect(TransferEvent, frozen=True):
    """D: blocks are reserved; the first `num_cached_tokens` are in them already."""

    transfer: TransferId
    block_ids: tuple[int, ...]
    num_tokens: int
    num_cached_tokens: int
    mark: int = 0  # of the store


class Arrived(TransferEvent, frozen=True):
    """All bytes of the chunk are in its slot."""

    epoch: int
    seq: int


class Stored(TransferEvent, frozen=True):
    """The chunk is verified and in the blocks."""

    epoch: int
    seq: int


class Corrupt(TransferEvent, frozen=True):
    """The chunk's bytes differ from those announced. The transfer's own blocks may hold them, if its store
    checks bytes as it writes; nothing reads them before COMMIT."""

    epoch: int
    seq: int
    error: str


class StoreFailed(TransferEvent, frozen=True):
    """The chunk was sound but could not be written."""

    epoch: int
    seq: int
    error: str


class Command(msgspec.Struct, frozen=True, tag=True):
    """Base of the commands that a machine gives to the shell."""


class OpenLink(Command, frozen=True):
    """P: connect; answered by LinkUp or LinkDown."""


class CloseLink(Command, frozen=True):
    """Kills the link and closes the control stream, after all that was sent before; not answered."""

    error: str


class Send(Command, frozen=True):
    message: (
        OfferTransfer
        | Accept
        | Ack
        | Commit
        | Committed
        | Nack
        | AbortTransfer
        | LinkHeartbeat
        | LinkUnneeded
    )


class SendChunk(Command, frozen=True):
    """P: gather into the slot, announce, send."""

    transfer: TransferId
    seq: int
    slot: int
    span: Span
    num_bytes: int
    block_ids: list[int]
    mark: int = 0


class Receive(Command, frozen=True):
    """D: receive the chunk's bytes into its slot; answered by Arrived or LinkDown."""

    chunk: KVChunk


class Store(Command, frozen=True):
    """D: verify and scatter; answered by Stored, Corrupt or StoreFailed."""

    chunk: KVChunk
    block_ids: tuple[int, ...]
    mark: int = 0


class Sent(Command, frozen=True):
    transfer: TransferId
    stats: TransferStats


class SendFailed(Command, frozen=True):
    transfer: TransferId
    error: str
    kind: FailureKind


class ReceivedMessage(Command, frozen=True):
    transfer: TransferId
    payload: bytes


class ReceiveFailed(Command, frozen=True):
    transfer: TransferId
    error: str
    kind: FailureKind


SenderEvent = (
    TransferTick
    | ReleaseLink
    | LinkUp
    | LinkDown
    | PeerGone
    | CancelTransfer
    | OpenTransfer
    | Extend
    | PartComputed
    | PrefillDone
    | CommitReady
    | GatherFailed
    | Accept
    | Ack
    | Committed
    | Nack
    | AbortTransfer
    | LinkHeartbeat
    | LinkUnneeded
)
ReceiverEvent = (
    TransferTick
    | ReleaseLink
    | LinkUp
    | LinkDown
    | PeerGone
    | CancelTransfer
    | Expect
    | Arrived
    | Stored
    | Corrupt
    | StoreFailed
    | OfferTransfer
    | KVChunk
    | Commit
    | AbortTransfer
    | LinkHeartbeat
)
SenderCommand = OpenLink | CloseLink | Send | SendChunk | Sent | SendFailed
ReceiverCommand = CloseLink | Send | Receive | Store | ReceivedMessage | ReceiveFailed
