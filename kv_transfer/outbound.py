"""P's shell of one pair: dials D on first use, gathers chunks into the ring, carries the sender's commands out."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from ..core.messages import TransferAddress
from ..core.request import TransferId
from .channel import Channel
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
from .gloo import SENDER_RANK, GlooLink, address_family
from .link import Link, LinkError, release
from .pair import Local, Pair, retire
from .protocol import PROTOCOL_VERSION, Chunk, Connect, Connected, Prepare, ReceiverMessage, Refused
from .sender import TransferSender
from .shm import ShmLink

logger = logging.getLogger(__name__)
M = TypeVar("M", Prepare, Connected)


class OutboundPair(Pair[SenderEvent, SenderCommand]):
    """All transfers to one worker."""

    def __init__(self, local: Local, target: TransferAddress, on_end: Callable[[TransferId], None]) -> None:
        super().__init__(local)
        self._on_end = on_end
        self._target = target
        self._sender = TransferSender(local.layout, local.config, local.counters, target.worker_id)
        self._dialling: asyncio.Task[None] | None = None

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
            case Send():
                if self._channel is not None:
                    self._channel.send(command.message)
            case Sent():
                self._on_end(command.transfer)
                local.notify(local.listener.on_sent, command.transfer, command.stats)
            case SendFailed():
                self._on_end(command.transfer)
                local.notify(local.listener.on_send_failed, command.transfer, command.error)
            case OpenLink():
                self._dialling = asyncio.get_running_loop().create_task(self._dial(next(local.epochs)))
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
            logger.exception("gathering %s of %s failed", span, command.transfer)
            self.feed(GatherFailed(epoch, command.transfer, command.seq, f"gathering failed: {error!r}"))
            return
        finally:
            release(data)
        channel.send(Chunk(epoch, command.transfer, command.seq, command.slot, span, command.num_bytes, checksum))
        ticket = link.send(command.slot, command.num_bytes, command.seq)
        if ticket is not None:
            self._when_done(ticket, lambda: None)

    # connecting

    async def _dial(self, epoch: int) -> None:
        try:
            async with asyncio.timeout(self.local.config.connect_timeout_s):
                await self._connect(epoch)
            return
        except TimeoutError:
            error = f"no answer within {self.local.config.connect_timeout_s} s"
        except (OSError, LinkError) as problem:
            error = str(problem)
        except Exception as problem:  # a bug; whoever waits for this link must hear of it all the same
            logger.exception("connecting to %s failed", self._target)
            error = repr(problem)
        self.feed(LinkDown(None, f"connecting to {self._target.worker_id} failed: {error}"))

    async def _connect(self, epoch: int) -> None:
        loop = asyncio.get_running_loop()
        kind = self._link_kind()
        answers: asyncio.Queue[ReceiverMessage | LinkError] = asyncio.Queue()
        sock = await self._open_socket(kind)
        channel: Channel[ReceiverMessage] = Channel(
            sock,
            ReceiverMessage,
            answers.put_nowait,
            lambda error: answers.put_nowait(LinkError(error)),
            takes_fd=kind == "shm",
        )
        link: Link | None = None
        try:
            channel.send(self._greeting(kind, epoch))
            prepare = _expected(await answers.get(), Prepare)
            if kind == "shm":
                link = _attach(channel, prepare)
            else:
                limit_s = self.local.config.connect_timeout_s
                gloo = link = GlooLink(SENDER_RANK, self.local.host, prepare.num_slots, prepare.slot_bytes, limit_s)
                await loop.run_in_executor(gloo.executor, gloo.connect, prepare.store_host, prepare.store_port)
            _expected(await answers.get(), Connected)
        except BaseException:
            channel.close()
            if link is not None:
                retire(self.local, link)
            raise
        self._dialling = None
        self._adopt(channel, link, epoch)
        while not answers.empty():
            answer = answers.get_nowait()
            if isinstance(answer, LinkError):
                self._link_failed(epoch, str(answer))
            else:
                self._on_message(answer)

    def _link_kind(self) -> str:
        is_near = self._target.host_id == self.local.host_id
        if self.local.transport == "auto":
            return "shm" if is_near else "gloo"
        if self.local.transport == "shm" and not is_near:
            raise LinkError("transport is shm, but the two workers cannot share memory")
        return self.local.transport

    async def _open_socket(self, kind: str) -> socket.socket:
        address: Any
        loop, target = asyncio.get_running_loop(), self._target
        if kind == "gloo":
            family, address = address_family(target.tcp_host), (target.tcp_host, target.tcp_port)
        else:
            family, address = socket.AF_UNIX, "\0" + target.unix_name
        sock = socket.socket(family)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _on_message(self, message: ReceiverMessage) -> None:
        if not isinstance(message, (Prepare, Connected, Refused)):
            self.feed(message)

    def _greeting(self, kind: str, epoch: int) -> Connect:
        local, target = self.local, self._target
        return Connect(
            version=PROTOCOL_VERSION,
            token=local.token,
            source_worker_id=local.worker_id,
            source_incarnation=local.incarnation,
            target_worker_id=target.worker_id,
            target_incarnation=target.incarnation,
            epoch=epoch,
            link=kind,
            layout=local.layout,
        )


def _expected(answer: ReceiverMessage | LinkError, kind: type[M]) -> M:
    if isinstance(answer, LinkError):
        raise answer
    if isinstance(answer, Refused):
        raise LinkError(f"refused: {answer.error}")
    if not isinstance(answer, kind):
        raise LinkError(f"the peer answered {type(answer).__name__}, expected {kind.__name__}")
    return answer


def _attach(channel: Channel[ReceiverMessage], prepare: Prepare) -> ShmLink:
    if not channel.fds:
        raise LinkError("the peer sent no memory with its ring")
    fd = channel.fds.pop()
    try:
        return ShmLink.attach(fd, prepare.num_slots, prepare.slot_bytes)
    finally:
        os.close(fd)
