"""P's shell of one pair: gathers chunks into the ring and carries out the sender's commands."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
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
from .idle_links import LinkUse
from .interfaces import ControlStream, TransferListener
from .link import Link, LinkError, release
from .pair import Local, Pair
from .protocol import (
    PROTOCOL_VERSION,
    Commit,
    Connect,
    Connected,
    KVChunk,
    LinkRefused,
    Meet,
    Prepare,
    ReceiverMessage,
)
from .sender import TransferSender
from .span import block_range

logger = logging.getLogger(__name__)


class Dialling(Protocol):
    """An attempt to connect that is under way."""

    def cancel(self) -> object: ...


class Dial(Protocol):
    """Connects in the background: calls the pair's `connected` or `not_connected`, unless it is cancelled
    before."""

    def __call__(self, pair: "OutboundPair", epoch: int, /) -> Dialling: ...


class OutboundPair(Pair[SenderEvent, SenderCommand]):
    """All transfers to one rank of one worker."""

    def __init__(
        self,
        local: Local,
        target: TransferAddress,
        dial: "Dial",
        heads: range | None = None,
        listener: TransferListener | None = None,
    ) -> None:
        super().__init__(local, heads, listener)
        self.target = target
        self._dial = dial
        self._sender = TransferSender(self._layout, local.config, local.counters, target.worker_id)
        self._dialling: Dialling | None = None
        # a chunk of theirs cannot leave, and one side has yet to hear of it
        self._spoilt: set[TransferId] = set()

    @property
    def is_idle(self) -> bool:
        return self._sender.is_idle and self._work.is_idle

    @property
    def use(self) -> LinkUse | None:
        """The use of the link; None while there is none."""
        return self._sender.use

    def _handle(self, event: SenderEvent, now_s: float) -> list[SenderCommand]:
        return self._sender.handle(event, now_s)

    def _execute(self, command: SenderCommand) -> None:
        local = self.local
        match command:
            case SendChunk():
                self._send_chunk(command)
            case Send(Commit() as commit):
                self._work.after(commit.transfer, partial(self._commit, commit))  # behind its last chunk
            case Send():
                if self._channel is not None:
                    self._channel.send(command.message)
            case Sent():
                local.notify(self._listener.on_sent, command.transfer, command.stats)
            case SendFailed():
                if self._work.is_under_way(command.transfer):
                    self._spoilt.add(command.transfer)
                # a device may still read its blocks
                self._work.after(command.transfer, partial(self._report_failure, command))
            case OpenLink():
                self._dialling = self._dial(self, next(local.epochs))
            case CloseLink():
                if self._dialling is not None:
                    self._dialling.cancel()
                    self._dialling = None
                self._drop_link()

    def _send_chunk(self, command: SendChunk) -> None:
        link, epoch, span = self._link, self._epoch, command.span
        if link is None or epoch is None:
            return  # it broke while the previous commands were carried out; LinkDown is on its way
        data = link.slot(command.slot, command.num_bytes)
        where = (
            span.layer_start,
            span.layer_end,
            *block_range(span, command.block_ids, self._layout.block_size),
        )
        try:
            gathered = self.local.store.gather(*where, data, command.mark, self._heads)
        except Exception as error:  # any failure of the store ends this transfer, not the pair
            release(data)
            self._spoilt.add(command.transfer)
            self._on_gathered(epoch, command, error)
            return
        if isinstance(gathered, int):
            release(data)
            self._on_gathered(epoch, command, gathered)
        else:
            self._work.add(command.transfer, gathered, data, partial(self._on_gathered, epoch, command))

    def _on_gathered(self, epoch: int, command: SendChunk, result: int | BaseException) -> None:
        """The chunk is in its slot, with this checksum, or its gather has failed."""
        transfer, seq = command.transfer, command.seq
        if epoch != self._epoch:
            return
        if isinstance(result, BaseException):
            logger.error(
                "gathering %s of %s failed",
                command.span,
                transfer,
                exc_info=result,
                extra=transfer.log_fields,
            )
            self.feed(GatherFailed(epoch, transfer, seq, f"gathering failed: {result!r}"))
        elif transfer in self._spoilt:
            self.feed(GatherFailed(epoch, transfer, seq, "the transfer had ended"))
        else:
            chunk = KVChunk(epoch, transfer, seq, command.slot, command.span, command.num_bytes, result)
            link = self._link
            assert link is not None, "it goes with its epoch"
            # D posts a receive for each announced chunk: announce it only when it is sent
            if link.takes_turns:
                self.local.turn.take(
                    link, partial(self._announce, chunk, lambda: self.local.turn.give_back(link))
                )
            else:
                self._announce(chunk, lambda: None)

    def _announce(self, chunk: KVChunk, when_sent: Callable[[], None]) -> None:
        link, channel = self._link, self._channel
        assert link is not None and channel is not None, "they go with their epoch"
        channel.send(chunk)
        try:
            ticket = link.send(chunk.slot, chunk.num_bytes, chunk.seq)
        except LinkError as error:
            self._link_failed(chunk.epoch, str(error))
            return
        if ticket is not None:
            self._when_done(ticket, when_sent)

    def _commit(self, commit: Commit) -> None:
        if self._link is not None and self._link.takes_turns:
            self.local.turn.behind(self._link, partial(self._send_commit, commit))
        else:
            self._send_commit(commit)

    def _send_commit(self, commit: Commit) -> None:
        """Commits, unless the transfer cannot be complete: the commit was decided before the machine knew,
        and would violate the protocol."""
        if self._channel is not None and commit.epoch == self._epoch and commit.transfer not in self._spoilt:
            self._channel.send(commit)

    def _report_failure(self, failed: SendFailed) -> None:
        self._spoilt.discard(failed.transfer)
        self.local.notify(self._listener.on_send_failed, failed.transfer, failed.error, failed.kind)

    def _drop_link(self) -> None:
        link = self._link
        super()._drop_link()
        if link is not None and link.takes_turns:
            self.local.turn.drop(link)

    # dialling

    def greeting(self, kind: str, epoch: int) -> Connect:
        """Returns the first frame of a connection."""
        mine, target = self.local.identity, self.target
        return Connect(
            version=PROTOCOL_VERSION,
            source_worker_id=mine.worker_id,
            source_incarnation=mine.incarnation,
            target_worker_id=target.worker_id,
            target_incarnation=target.incarnation,
            epoch=epoch,
            link=kind,
            layout=self.local.layout,
            gpu=mine.place.gpu,
            source_rank=self.local.share.rank,
            num_source_ranks=self.local.share.num_ranks,
            target_rank=target.rank,
            num_target_ranks=target.num_ranks,
        )

    def connected(
        self, channel: ControlStream, link: Link, epoch: int, early: Iterable[ReceiverMessage | LinkError]
    ) -> None:
        """The link is up on both sides; `early` arrived meanwhile."""
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
        if not isinstance(message, Prepare | Meet | Connected | LinkRefused):
            self.feed(message)
