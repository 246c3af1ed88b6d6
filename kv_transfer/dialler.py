"""P's connection to D: connects, greets, builds the link, and hands both to the pair."""

import asyncio
import logging
import os
import socket
from typing import Any

from ..core import handshake
from ..core.messages import TransferAddress
from .channel import Channel
from .choice import Place, choose_link
from .connecting import Answer, Connecting
from .link import Link, LinkError
from .link_maker import LinkMaker
from .meeting import SENDER_RANK, Meeting, MeetingLink, meeting_over
from .outbound import OutboundPair
from .pair import Local
from .protocol import Prepare, ReceiverMessage
from .shm import ShmLink
from .sockets import address_family, shake_hands

logger = logging.getLogger(__name__)
Answers = asyncio.Queue[Answer]
Connection = tuple[Channel[ReceiverMessage], Link, Answers]


class TransferDialler:
    """Implements `outbound.Dial` on the endpoint's loop."""

    def __init__(self, local: Local, links: LinkMaker, token: str, transport: str) -> None:
        self._local = local
        self._links = links
        self._token = token
        self._transport = transport

    def __call__(self, pair: OutboundPair, epoch: int, /) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(self._dial(pair, epoch))

    async def _dial(self, pair: OutboundPair, epoch: int) -> None:
        target = pair.target
        try:
            kind = choose_link(self._local.identity.place, Place(target.host_id, target.gpu), self._transport)
            connecting = Connecting(kind, self._local.config)
            try:
                async with asyncio.timeout(connecting.timeout_s) as limit:
                    channel, link, answers = await self._connect(pair, epoch, kind, connecting, limit)
            except TimeoutError:
                raise LinkError(connecting.expired) from None
        except (OSError, LinkError, handshake.HandshakeError) as problem:
            pair.not_connected(str(problem))
        except Exception as problem:  # a bug; what waits for this link must be informed all the same
            logger.exception("connecting to %s failed", pair.target)
            pair.not_connected(repr(problem))
        else:
            pair.connected(channel, link, epoch, [answers.get_nowait() for _ in range(answers.qsize())])

    async def _connect(
        self, pair: OutboundPair, epoch: int, kind: str, connecting: Connecting, limit: asyncio.Timeout
    ) -> Connection:
        answers: Answers = asyncio.Queue()
        is_near = kind != "gloo" and pair.target.host_id == self._local.identity.place.host_id
        channel: Channel[ReceiverMessage] = Channel(
            await _open_socket(pair.target, is_near=is_near, token=self._token),
            ReceiverMessage,
            answers.put_nowait,
            lambda error: answers.put_nowait(LinkError(error)),
            takes_fd=kind == "shm",
        )
        link: Link | None = None
        try:
            channel.send(pair.greeting(kind, epoch))
            prepare = connecting.prepared(await answers.get())
            if connecting.build_timeout_s is not None:
                limit.reschedule(asyncio.get_running_loop().time() + connecting.build_timeout_s)
                group = link = self._links.group(kind, SENDER_RANK, prepare.num_slots, prepare.slot_bytes)
                await _build(group, meeting_over(channel, epoch), answers, connecting)
            else:
                link = _attach(channel, prepare) if kind == "shm" else self._links.ring_of_peer(prepare)
                connecting.built(await answers.get())
        except BaseException:
            channel.close()
            if link is not None:
                self._local.retire(link)
            raise
        return channel, link, answers


async def _build(link: MeetingLink, meeting: Meeting, answers: Answers, connecting: Connecting) -> None:
    """Returns when both sides are up. Raises as soon as D is gone: the link may not notice by itself."""
    loop = asyncio.get_running_loop()
    building = loop.run_in_executor(link.executor, link.build, meeting)
    building.add_done_callback(lambda done: done.cancelled() or done.exception())
    answer = loop.create_task(_meet(answers, meeting, connecting))
    try:
        await asyncio.wait((building, answer), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
        await asyncio.shield(building)
        await answer
    finally:
        answer.cancel()
        meeting.close()


async def _meet(answers: Answers, meeting: Meeting, connecting: Connecting) -> None:
    """Waits until D's side of the link is up. Raises LinkError."""
    while (entry := connecting.built(await answers.get())) is not None:
        meeting.put(entry.key, entry.value)


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


def _attach(channel: Channel[ReceiverMessage], prepare: Prepare) -> ShmLink:
    if not channel.fds:
        raise LinkError("the peer sent no memory with its ring")
    fd = channel.fds.pop()
    try:
        return ShmLink.attach(fd, prepare.num_slots, prepare.slot_bytes)
    finally:
        os.close(fd)
