"""D's shell of one pair: moves chunks from the ring into the blocks and carries out the receiver's
commands."""

import logging
from functools import partial
from typing import Any

from .events import (
    Arrived,
    CloseLink,
    Corrupt,
    Receive,
    ReceivedMessage,
    ReceiveFailed,
    ReceiverCommand,
    ReceiverEvent,
    Send,
    Store,
    Stored,
    StoreFailed,
)
from .idle_links import LinkUse
from .interfaces import ControlStream, Pending, Slot, TransferListener
from .link import Link, LinkError, release
from .pair import Local, Pair
from .protocol import Connect, Connected, KVChunk, Meet, SenderMessage
from .receiver import TransferReceiver
from .span import block_range

logger = logging.getLogger(__name__)


class InboundPair(Pair[ReceiverEvent, ReceiverCommand]):
    """All transfers from one worker."""

    def __init__(
        self,
        local: Local,
        source_worker_id: str,
        heads: range | None = None,
        listener: TransferListener | None = None,
    ) -> None:
        super().__init__(local, heads, listener)
        self.last_epoch = 0  # the newest that was requested; earlier ones are fenced
        self.num_preparing = 0  # connections that the acceptor is about to `attach`
        self._receiver = TransferReceiver(self._layout, local.config, local.counters, source_worker_id)

    @property
    def is_idle(self) -> bool:
        return self._receiver.is_idle and not self.num_preparing and self._work.is_idle

    @property
    def use(self) -> LinkUse | None:
        """The use of the link; None while there is none."""
        is_new = self._receiver.use is None and self.num_preparing > 0
        return LinkUse(0.0, is_busy=True) if is_new else self._receiver.use

    def attach(self, channel: ControlStream, link: Link, epoch: int) -> bool:
        """Our end of the link is up. Returns False when the source has connected anew since, or this
        connection is lost. A link that is still up is of an older epoch and is killed."""
        if epoch != self.last_epoch or not channel.is_open:
            return False
        channel.send(Connected(epoch))
        if self._epoch is not None:
            self._link_failed(self._epoch, f"the source connected anew (epoch {epoch})")
        self._adopt(channel, link, epoch)
        return True

    def _on_message(self, message: SenderMessage) -> None:
        if not isinstance(message, Connect | Meet):
            self.feed(message)

    def _handle(self, event: ReceiverEvent, now_s: float) -> list[ReceiverCommand]:
        return self._receiver.handle(event, now_s)

    def _execute(self, command: ReceiverCommand) -> None:
        local = self.local
        match command:
            case Receive():
                self._receive(command.chunk)
            case Store():
                self._store(command)
            case Send():
                if self._channel is not None:
                    self._channel.send(command.message)
            case ReceivedMessage():
                local.notify(self._listener.on_received, command.transfer, command.payload)
            case ReceiveFailed():
                failed = command.transfer, command.error, command.kind
                report = partial(local.notify, self._listener.on_receive_failed, *failed)
                self._work.after(command.transfer, report)  # a device may still write to its blocks
            case CloseLink():
                self._drop_link()

    def _receive(self, chunk: KVChunk) -> None:
        if self._link is None:
            return
        try:
            ticket: Any = self._link.recv(chunk.slot, chunk.num_bytes, chunk.seq)
        except LinkError as error:
            self._link_failed(chunk.epoch, str(error))
            return
        arrived = Arrived(chunk.epoch, chunk.seq)
        if ticket is None:
            self.feed(arrived)
        else:
            self._when_done(ticket, lambda: self.feed(arrived))

    def _store(self, command: Store) -> None:
        chunk = command.chunk
        if self._link is None or self._epoch != chunk.epoch:
            return  # it broke while the previous commands were carried out; LinkDown is on its way
        data = self._link.slot(chunk.slot, chunk.num_bytes)
        try:
            pending = self._write(command, data)
        except Exception as error:  # any failure of the store ends this transfer, not the pair
            outcome = self._outcome(chunk, error)
        else:
            if not isinstance(pending, int):
                self._work.add(
                    chunk.transfer, pending, data, lambda result: self.feed(self._outcome(chunk, result))
                )
                return
            outcome = self._outcome(chunk, pending)
        release(data)
        self.feed(outcome)

    def _write(self, command: Store, data: Slot) -> int | Pending:
        """Returns the data's checksum; when it is wrong, nothing is written unless the store computes it only
        while it writes."""
        store, chunk, span = self.local.store, command.chunk, command.chunk.span
        checksum = store.checksum(data)
        if checksum is not None and checksum != chunk.checksum:
            return checksum
        blocks = block_range(span, command.block_ids, self._layout.block_size)
        where = span.layer_start, span.layer_end, *blocks
        return store.scatter(*where, data, command.mark, self._heads) or chunk.checksum

    def _outcome(self, chunk: KVChunk, result: int | BaseException) -> Stored | Corrupt | StoreFailed:
        if isinstance(result, BaseException):
            fields = chunk.transfer.log_fields
            logger.error(
                "scattering %s of %s failed", chunk.span, chunk.transfer, exc_info=result, extra=fields
            )
            return StoreFailed(chunk.epoch, chunk.seq, f"scattering failed: {result!r}")
        if result != chunk.checksum:
            return Corrupt(
                chunk.epoch, chunk.seq, f"chunk {chunk.seq}: its bytes do not have the announced checksum"
            )
        return Stored(chunk.epoch, chunk.seq)
