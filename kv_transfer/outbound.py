"""P's shell of one pair: gathers chunks into the ring, carries the sender's commands out."""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from ..core.messages import TransferAddress
from ..core.request import TransferId
from .events import (
    CloseLink,
    GatherFailed,
    LinkDown,
    OpenLink,
    Send,
    SendChunk,
    SenderCommand,
    SenderEvent,
    SendFailed,
    Sent,
)
from .interfaces import Stream
from .link import Link, LinkError, release
from .pair import Local, Pair
from .protocol import PROTOCOL_VERSION, Chunk, Commit, Connect, Connected, Prepare, ReceiverMessage, Refused
from .sender import TransferSender

logger = logging.getLogger(__name__)


class Dialling(Protocol):
    """An attempt to connect that is under way."""

    def cancel(self) -> object: ...


class Dial(Protocol):
    """Connects in the background: calls the pair's `connected` or `not_connected`, unless it is cancelled before."""

    def __call__(self, pair: "OutboundPair", epoch: int, /) -> Dialling: ...


class OutboundPair(Pair[SenderEvent, SenderCommand]):
    """All transfers to one worker."""

    def __init__(self, local: Local, target: TransferAddress, dial: "Dial", on_end: Callable[[TransferId], None]) -> None:
        super().__init__(local)
        self.target = target
        self._dial = dial
        self._on_end = on_end
        self._sender = TransferSender(local.layout, local.config, local.counters, target.worker_id)
        self._dialling: Dialling | None = None
        self._ungathered: set[TransferId] = set()  # a chunk of theirs could not leave, and the machine has yet to hear of it

    @property
    def is_idle(self) -> bool:
        return self._sender.is_idle

    def _handle(self, event: SenderEvent, now_s: float) -> list[SenderCommand]:
        return self._sender.handle(event, now_s)

    def _execute(self, command: SenderCommand) -> None:
        local = self.local
        match command:
            case SendChunk():
                self._send_chunk(command)
            case Send(Commit(transfer=transfer)) if transfer in self._ungathered:
                pass  # decided before the machine knew; the peer would take it for a breach of the protocol
            case Send():
                if self._channel is not None:
                    self._channel.send(command.message)
            case Sent():
                self._on_end(command.transfer)
                local.notify(local.listener.on_sent, command.transfer, command.stats)
            case SendFailed():
                self._ungathered.discard(command.transfer)
                self._on_end(command.transfer)
                local.notify(local.listener.on_send_failed, command.transfer, command.error)
            case OpenLink():
                self._dialling = self._dial(self, next(local.epochs))
            case CloseLink():
                if self._dialling is not None:
                    self._dialling.cancel()
                    self._dialling = None
                self._drop_link()

    def _send_chunk(self, command: SendChunk) -> None:
        link, channel, epoch, span = self._link, self._channel, self._epoch, command.span
        if link is None or channel is None or epoch is None:
            return  # it broke while the commands before this one were carried out; LinkDown is on its way
        data = link.slot(command.slot, command.num_bytes)
        try:
            checksum = self.local.store.gather(
                span.layer_start, span.layer_end, command.block_ids, span.token_start, span.token_end, data
            )
        except Exception as error:  # whatever the store could not do ends this transfer, not the pair
            logger.exception("gathering %s of %s failed", span, command.transfer, extra=command.transfer.log_fields)
            self._ungathered.add(command.transfer)
            self.feed(GatherFailed(epoch, command.transfer, command.seq, f"gathering failed: {error!r}"))
            return
        finally:
            release(data)
        channel.send(Chunk(epoch, command.transfer, command.seq, command.slot, span, command.num_bytes, checksum))
        try:
            ticket = link.send(command.slot, command.num_bytes, command.seq)
        except LinkError as error:
            self._link_failed(epoch, str(error))
            return
        if ticket is not None:
            self._when_done(ticket, lambda: None)

    # dialling

    def greeting(self, kind: str, epoch: int) -> Connect:
        """The first frame of a connection."""
        local, target = self.local, self.target
        return Connect(
            version=PROTOCOL_VERSION,
            source_worker_id=local.worker_id,
            source_incarnation=local.incarnation,
            target_worker_id=target.worker_id,
            target_incarnation=target.incarnation,
            epoch=epoch,
            link=kind,
            layout=local.layout,
        )

    def connected(self, channel: Stream, link: Link, epoch: int, early: Iterable[ReceiverMessage | LinkError]) -> None:
        """The link stands on both sides; `early` came in meanwhile."""
        self._dialling = None
        self._adopt(channel, link, epoch)
        for answer in early:
            if isinstance(answer, LinkError):
                self._link_failed(epoch, str(answer))
            else:
                self._on_message(answer)

    def not_connected(self, error: str) -> None:
        self._dialling = None
        self.feed(LinkDown(None, f"connecting to {self.target.worker_id} failed: {error}"))

    def _on_message(self, message: ReceiverMessage) -> None:
        if not isinstance(message, (Prepare, Connected, Refused)):
            self.feed(message)
