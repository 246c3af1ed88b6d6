"""P's connection to D: connects, greets, builds the link, and hands both to the pair."""

import asyncio
import logging
import os
import socket
from typing import Any, TypeVar

from ..core import handshake
from ..core.messages import TransferAddress
from .channel import Channel
from .choice import Place, choose_link
from .cuda_ipc import CudaIpcLink
from .gloo import address_family
from .greeting import shake_hands
from .group_link import SENDER_RANK, GroupLink
from .group_links import group_link
from .link import Link, LinkError
from .meeting import Meeting, meeting_over
from .outbound import OutboundPair
from .pair import Local, retire
from .protocol import Connected, LinkRefused, Meet, Prepare, ReceiverMessage
from .shm import ShmLink

logger = logging.getLogger(__name__)
M = TypeVar("M", Prepare, Connected)
Answers = asyncio.Queue[ReceiverMessage | LinkError]
Connection = tuple[Channel[ReceiverMessage], Link, Answers]


class TransferDialler:
    """Implements `outbound.Dial` on the endpoint's loop."""

    def __init__(self, local: Local) -> None:
        self._local = local

    def __call__(self, pair: OutboundPair, epoch: int, /) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(self._dial(pair, epoch))

    async def _dial(self, pair: OutboundPair, epoch: int) -> None:
        timeout_s = self._local.config.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                channel, link, answers = await self._connect(pair, epoch, limit)
        except TimeoutError:
            pair.not_connected(f"no answer within {timeout_s} s, or no link in its time")
        except (OSError, LinkError, handshake.HandshakeError) as problem:
            pair.not_connected(str(problem))
        except (
            Exception
        ) as problem:  # a bug; the component that waits for this link must be informed all the same
            logger.exception("connecting to %s failed", pair.target)
            pair.not_connected(repr(problem))
        else:
            pair.connected(channel, link, epoch, [answers.get_nowait() for _ in range(answers.qsize())])

    async def _connect(self, pair: OutboundPair, epoch: int, limit: asyncio.Timeout) -> Connection:
        local, target = self._local, pair.target
        kind = choose_link(
            Place(local.host_id, local.gpu_uuid), Place(target.host_id, target.gpu), local.transport
        )
        answers: Answers = asyncio.Queue()
        sock = await _open_socket(
            target, is_near=kind != "gloo" and target.host_id == local.host_id, token=local.token
        )
        channel: Channel[ReceiverMessage] = Channel(
            sock,
            ReceiverMessage,
            answers.put_nowait,
            lambda error: answers.put_nowait(LinkError(error)),
            takes_fd=kind == "shm",
        )
        link: Link | None = None
        try:
            channel.send(pair.greeting(kind, epoch))
            prepare = _expected(await answers.get(), Prepare)
            if kind == "shm":
                link = _attach(channel, prepare)
                _expected(await answers.get(), Connected)
            elif kind == "cuda_ipc":
                link = self._open_ring(prepare)
                _expected(await answers.get(), Connected)
            else:
                limit.reschedule(asyncio.get_running_loop().time() + local.config.build_timeout_s(kind))
                group = link = group_link(local, kind, SENDER_RANK, prepare.num_slots, prepare.slot_bytes)
                await _build(group, meeting_over(channel, epoch), answers)
        except BaseException:
            channel.close()
            if link is not None:
                retire(self._local, link)
            raise
        return channel, link, answers

    def _open_ring(self, prepare: Prepare) -> CudaIpcLink:
        assert self._local.gpu is not None, "the link was chosen by it"
        ring = self._local.gpu.open(prepare.handle, prepare.num_slots * prepare.slot_bytes)
        return CudaIpcLink(ring, prepare.num_slots, prepare.slot_bytes)


async def _build(link: GroupLink, meeting: Meeting, answers: Answers) -> None:
    """Returns when both sides are up. Raises as soon as D is gone: the link may not notice by itself."""
    loop = asyncio.get_running_loop()
    building = loop.run_in_executor(link.executor, link.build, meeting)
    building.add_done_callback(lambda done: done.cancelled() or done.exception())
    answer = loop.create_task(_meet(answers, meeting))
    try:
        await asyncio.wait((building, answer), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
        await asyncio.shield(building)
        await answer
    finally:
        answer.cancel()
        meeting.close()


async def _meet(answers: Answers, meeting: Meeting) -> None:
    """Waits until D's side of the link is up. Raises LinkError."""
    while isinstance(answer := await answers.get(), Meet):
        meeting.put(answer.key, answer.value)
    _expected(answer, Connected)


async def _open_socket(target: TransferAddress, *, is_near: bool, token: str) -> socket.socket:
    """Returns a connection on which both sides have authenticated each other."""
    address: Any
    if is_near:
        family, address = socket.AF_UNIX, target.unix_path
    else:
        family, address = address_family(target.tcp_host), (target.tcp_host, target.tcp_port)
    sock = socket.socket(family)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
        await shake_hands(sock, handshake.HandshakeDialler(token, handshake.Purpose.TRANSFER))
    except BaseException:
        sock.close()
        raise
    return sock


def _expected(answer: ReceiverMessage | LinkError, kind: type[M]) -> M:
    if isinstance(answer, LinkError):
        raise answer
    if isinstance(answer, LinkRefused):
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
