"""D's listening end: peers connect, prove that they belong to the cluster, and are handed to their pair."""

import asyncio
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..core import handshake
from ..core.handshake import MAX_UNPROVEN
from ..core.peer_log import peer_log
from .channel import Channel
from .config import Membership
from .inbound import InboundPair
from .link import Link, LinkError
from .link_maker import LinkMaker
from .meeting import RECEIVER_RANK, meeting_over
from .pair import Local
from .protocol import Connect, LinkRefused, Meet, Prepare, SenderMessage
from .shm import ShmLink
from .sockets import listening_socket, shake_hands

_PAGE_BYTES = 4096
# before the next attempt, when the process has no descriptor or memory left for a connection
ACCEPT_PAUSE_S = 0.5
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class TransferAcceptor:
    """Listens on TCP and on a Unix socket in a private folder, which no other user can enter. Closes a
    connection that does not greet in time."""

    def __init__(
        self,
        local: Local,
        member: Membership,
        links: LinkMaker,
        admit: Callable[[Connect], InboundPair | str],
    ) -> None:
        self._local = local
        self._token = member.token
        self._links = links
        self._admit = admit  # returns the pair to which a greeting belongs, or why it is refused
        # A killed process leaves the folder behind: it is removed with the owner of `socket_root`.
        self._folder = Path(tempfile.mkdtemp(prefix="kv-", dir=member.socket_root))
        self.unix_path = str(self._folder / "s")
        self._unix = socket.socket(socket.AF_UNIX)
        try:
            self._unix.bind(self.unix_path)
            self._unix.listen(128)
            self._tcp = listening_socket(member.host)
        except BaseException:
            self._unix.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.tcp_port: int = self._tcp.getsockname()[1]
        self._ungreeted: set[Channel[SenderMessage]] = set()
        self._unproven: dict[asyncio.Task[None], None] = {}  # handshakes, the oldest first
        self._preparing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Starts to listen; called on the endpoint's loop."""
        for sock in (self._unix, self._tcp):
            sock.setblocking(False)
            self._listen(sock)

    def _listen(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:  # else it was closed during a pause
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def stop_listening(self) -> None:
        for sock in (self._unix, self._tcp):
            sock.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def close(self) -> None:
        for sock in (self._unix, self._tcp):
            asyncio.get_running_loop().remove_reader(sock)
        self.stop_listening()
        tasks = self._preparing | self._unproven.keys()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in list(self._ungreeted):
            self._dismiss(channel)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = listener.accept()
        except OSError as error:  # the peer is gone, or descriptors ran out: others may connect
            peer_log.warning("accepting a connection failed: %s", error)
            # the connection waits in the backlog, so the listener stays readable
            if error.errno in _EXHAUSTED:
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_PAUSE_S, self._listen, listener)
            return
        sock.setblocking(False)
        # a genuine peer proves itself at once: the oldest is the least likely one
        if len(self._unproven) >= MAX_UNPROVEN:
            oldest = next(iter(self._unproven))
            self._unproven.pop(oldest)
            oldest.cancel()
            self._count_refusal(f"{MAX_UNPROVEN} newer ones have proved nothing yet")
        task = loop.create_task(self._meet(sock))
        self._unproven[task] = None
        task.add_done_callback(partial(self._met, sock))

    def _met(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._unproven.pop(task, None)
        if task.cancelled():  # perhaps before it had begun
            sock.close()

    async def _meet(self, sock: socket.socket) -> None:
        """Checks whether the peer belongs to this cluster; one that does may greet in the time that
        remains."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._local.config.connect_timeout_s
        try:
            async with asyncio.timeout_at(due_s):
                await shake_hands(sock, handshake.HandshakeAcceptor(self._token, handshake.Purpose.TRANSFER))
        except (OSError, handshake.HandshakeError) as error:  # TimeoutError is an OSError
            self._count_refusal(str(error) or "no proof came in time")
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        channel: Channel[SenderMessage] = Channel(sock, SenderMessage, lambda _: None, lambda _: None)
        self._ungreeted.add(channel)
        channel.on_message = partial(self._on_greeting, channel)
        channel.on_lost = lambda _: self._ungreeted.discard(channel)
        loop.call_at(due_s, self._on_timeout, channel)

    def _on_timeout(self, channel: Channel[SenderMessage]) -> None:
        if channel in self._ungreeted:
            self._dismiss(channel)

    def _dismiss(self, channel: Channel[SenderMessage]) -> None:
        self._ungreeted.discard(channel)
        channel.close()

    def _on_greeting(self, channel: Channel[SenderMessage], message: SenderMessage) -> None:
        if not isinstance(message, Connect):
            self._refuse(channel, f"the first message was {type(message).__name__}, expected Connect")
            return
        pair = self._admit(message)
        if isinstance(pair, str):
            self._refuse(channel, pair)
            return
        task = asyncio.get_running_loop().create_task(self._prepare(channel, pair, message))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    def _refuse(self, channel: Channel[SenderMessage], error: str) -> None:
        self._count_refusal(error)
        channel.send(LinkRefused(error))
        self._dismiss(channel)

    def _count_refusal(self, why: str) -> None:
        peer_log.warning("refused a connection: %s", why)
        self._local.counters.num_connects_refused += 1

    async def _prepare(self, channel: Channel[SenderMessage], pair: InboundPair, connect: Connect) -> None:
        """Sets up the ring and hands the connection over."""
        pair.num_preparing += 1
        try:
            if connect.link == "shm":
                link = self._prepare_shm(channel, connect.epoch)
            elif connect.link == "cuda_ipc":
                link = self._prepare_cuda_ipc(channel, connect.epoch)
            else:
                link = await self._prepare_group(channel, connect.link, connect.epoch)
        except Exception as error:  # memory, descriptors, sockets: only this connection fails
            self._refuse(channel, f"preparing the link failed: {error}")
            return
        finally:
            pair.num_preparing -= 1
        self._ungreeted.discard(channel)
        if not pair.attach(channel, link, connect.epoch):
            channel.close()
            self._local.retire(link)

    def _ring(self, link: str) -> tuple[int, int]:
        layout, config = self._local.layout, self._local.config
        slot_bytes = max(config.chunk_bytes_of(link), layout.wire_bytes_per_cell)
        return config.ring_slots, -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES

    def _prepare_shm(self, channel: Channel[SenderMessage], epoch: int) -> Link:
        num_slots, slot_bytes = self._ring("shm")
        link, fd = ShmLink.create(num_slots, slot_bytes)
        try:
            channel.send(Prepare(epoch, num_slots, slot_bytes), fd)
        finally:
            os.close(fd)
        return link

    def _prepare_cuda_ipc(self, channel: Channel[SenderMessage], epoch: int) -> Link:
        num_slots, slot_bytes = self._ring("cuda_ipc")
        link, handle = self._links.own_ring(num_slots, slot_bytes)
        channel.send(Prepare(epoch, num_slots, slot_bytes, handle=handle))
        return link

    async def _prepare_group(self, channel: Channel[SenderMessage], kind: str, epoch: int) -> Link:
        num_slots, slot_bytes = self._ring(kind)
        link = self._links.group(kind, RECEIVER_RANK, num_slots, slot_bytes)
        meeting = meeting_over(channel, epoch)
        channel.send(Prepare(epoch, num_slots, slot_bytes))
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()

        def on_lost(error: str) -> None:
            self._ungreeted.discard(channel)
            if not lost.done():
                lost.set_result(error)

        def on_message(message: SenderMessage) -> None:
            if isinstance(message, Meet):
                try:
                    meeting.put(message.key, message.value)
                except LinkError as error:
                    on_lost(str(error))
            else:
                self._on_greeting(channel, message)

        channel.on_lost, channel.on_message = on_lost, on_message
        try:
            building = loop.run_in_executor(link.executor, link.build, meeting)
            building.add_done_callback(lambda done: done.cancelled() or done.exception())
            async with asyncio.timeout(self._local.config.build_timeout_s(kind)):
                await asyncio.wait((building, lost), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():  # the link may not notice by itself
                raise LinkError(f"the source has gone: {lost.result()}")
            await building
        except BaseException:
            self._local.retire(link)
            raise
        finally:
            meeting.close()
        return link
