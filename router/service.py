"""The router's shell: clients' streams on one side, workers' connections on the other, the pure router in
between.

Runs on one asyncio loop. Every event goes through `RouterService.handle`, which carries out the commands
before it returns."""

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Iterable
from typing import Protocol

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from ..core.errors import DuplicateRequest
from ..core.handshake import HandshakeAcceptor, HandshakeError, HandshakeStream, Purpose
from ..core.held_bytes import HeldBytes
from ..core.messages import HostFull, WorkerMessage
from ..core.peer_log import peer_log
from ..core.pump import CommandPump
from ..core.request import FinishReason, Request
from .client_stream import ClientStream, StreamEvent
from .core import Router
from .cores import Key
from .events import (
    Cancel,
    EmitChoiceEnd,
    EmitEnd,
    EmitTokens,
    RequestClosed,
    RouterCommand,
    RouterEvent,
    SendCommand,
    StreamRead,
    StreamUnread,
    Submit,
    Tick,
    WorkerIdle,
    WorkerReady,
)
from .recorder import RequestRecorder
from .supervisor import ConnectionLost, WorkerProgress
from .worker_sessions import HangUp, Refused, Say, SessionCommand, ToRouter, ToSupervisor, WorkerSessions

log = logging.getLogger(__name__)


class WorkerObserver(Protocol):
    """An observer of workers' states: the fleet's controller."""

    def expects(self, key: Key) -> bool:
        """Whether the worker was started, is presumed to be running, and is not to end."""
        ...

    def handle(
        self, event: WorkerProgress | WorkerReady | WorkerIdle | ConnectionLost | HostFull
    ) -> None: ...


class RouterService:
    """Carries events to the router and its commands to streams and workers."""

    def __init__(
        self, router: Router, observer: WorkerObserver, token: str, recorder: RequestRecorder | None = None
    ) -> None:
        self.router = router
        self._observer = observer
        self._recorder = recorder
        self.token = token
        self.sessions: WorkerSessions[_WorkerConnection] = WorkerSessions(observer.expects)
        self._streams: dict[str, ClientStream] = {}
        self._unread = HeldBytes(router.config.max_unread_bytes, "streams that are not read")
        self._pump: CommandPump[RouterCommand] = CommandPump(self._carry_out)
        self._decides = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tick: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int = 0, listener: socket.socket | None = None) -> int:
        """Accepts workers on `port` of `host`, on a free port, or on a `listener`; returns the port."""
        loop = asyncio.get_running_loop()
        if listener is None:
            self._server = await loop.create_server(lambda: _WorkerConnection(self), host, port)
        else:
            self._server = await loop.create_server(lambda: _WorkerConnection(self), sock=listener)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Closes every connection. Streams have already been closed by the server that opened them."""
        if self._tick is not None:
            self._tick.cancel()
        if self._server is not None:
            self._server.close()
        for connection in self.sessions.connections:
            connection.close()

    async def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Yields the request's stream: tokens, the end of each choice, then one EmitEnd. Closing the iterator
        cancels.

        Raises Overloaded, DuplicateRequest or NoWorkerAvailable before the first event; TooManyBytes when too
        much is unread.
        """
        if request.request_id in self._streams:
            raise DuplicateRequest(request.request_id)
        stream = self._streams[request.request_id] = ClientStream(request.client, self._unread)
        ended = False
        try:
            self.handle(Submit(request))
            stream.is_handed_over = True
            while not ended:
                event = await stream.get()
                ended = isinstance(event, EmitEnd)
                if stream.is_unread and stream.num_unread <= self.router.config.max_unread_tokens // 2:
                    stream.is_unread = False
                    self.handle(StreamRead(request.request_id))
                yield event
        finally:
            del self._streams[request.request_id]
            stream.close()
            # a refused request may share the id of another live request
            if stream.is_handed_over and not ended:
                self.handle(Cancel(request.request_id))

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it because its stop string was found."""
        reason = FinishReason.CANCELLED if choice is None else FinishReason.STOP
        self.handle(Cancel(request_id, reason, choice))

    def handle(self, event: RouterEvent) -> None:
        """Passes one event through the router and carries out its commands. An observer may call this from
        within a command; the resulting commands are carried out after those decided before."""
        loop = asyncio.get_running_loop()
        if self._recorder is not None:
            self._recorder.observe(event)
        if self._pump.run(self.router.handle(event, loop.time())):
            self._schedule_tick(loop)
        if not self.router.is_adopting:
            self._decides.set()

    async def taken_over(self) -> None:
        """Returns when the router has taken over all that workers hold, and accepts requests."""
        await self._decides.wait()

    def _carry_out(self, command: RouterCommand) -> None:
        match command:
            case SendCommand(worker_id, incarnation, message):
                connection = self.sessions.connection((worker_id, incarnation))
                if connection is not None:  # else its loss is being reported already
                    connection.send(message)
            case EmitTokens() | EmitChoiceEnd() | EmitEnd():
                stream = self._streams.get(command.request_id)
                if stream is not None:
                    self._feed(stream, command)
            case WorkerIdle():
                self._observer.handle(command)
            case RequestClosed(_, timeline):
                if self._recorder is not None:
                    self._recorder.closed(timeline)

    def _feed(self, stream: ClientStream, event: StreamEvent) -> None:
        """Feeds an event to a client's stream. When too much is unread, the request leaves the workers, and
        returns when half of that is read. Events handed over at once to a returning client do not count. It
        ends when its client holds too much in all."""
        if not stream.put(event):
            self.handle(Cancel(event.request_id))
        elif not stream.is_unread and stream.num_unread > self.router.config.max_unread_tokens:
            stream.is_unread = True
            self.handle(StreamUnread(event.request_id))

    def _schedule_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        due_s = self.router.next_tick_s()
        if self._tick is not None:
            if due_s is not None and self._tick.when() <= due_s:
                return
            self._tick.cancel()
            self._tick = None
        if due_s is not None:
            self._tick = loop.call_at(due_s, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self.handle(Tick())

    # workers' connections

    def carry_out(self, commands: Iterable[SessionCommand["_WorkerConnection"]]) -> None:
        """Carries out the commands of `sessions`."""
        for command in commands:
            match command:
                case ToRouter(event):
                    self.handle(event)
                case Say(connection, message):
                    connection.send(message)
                case ToSupervisor(event):
                    self._observer.handle(event)
                case HangUp(connection):
                    connection.hang_up()
                case Refused(reason, is_harmless):
                    level = logging.DEBUG if is_harmless else logging.WARNING
                    peer_log.log(level, "refused a connection to the workers' port: %s", reason)


class _WorkerConnection(asyncio.Protocol):
    """One worker's control connection: a handshake, Hello, then reports up and commands down."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._sessions = service.sessions
        self._handshake = HandshakeStream(HandshakeAcceptor(service.token, Purpose.CONTROL))
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from connection_made on, which is called first
        self._beating: asyncio.TimerHandle | None = None
        self._reason: str | None = None  # why we closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._service.carry_out(self._sessions.opened(self, self._loop.time()))
        self._beating = self._loop.call_later(self._sessions.heartbeat_s, self._beat)

    def data_received(self, data: bytes) -> None:
        self._sessions.heard(self)
        try:
            answer, frames = self._handshake.feed(data)
            self._transport.write(answer)
            for message in self._decoder.feed(frames):
                self._service.carry_out(self._sessions.received(self, message))
        except (FrameError, HandshakeError) as error:
            self._service.carry_out(self._sessions.hang_up(self, str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._beating is not None:
            self._beating.cancel()
        error = str(exc) if exc else self._reason
        self._service.carry_out(self._sessions.closed(self, error, self._loop.time()))

    def send(self, message: object) -> None:
        self._transport.write(self._encoder.encode(message))

    def hang_up(self) -> None:
        self._transport.abort()

    def close(self) -> None:
        """Hangs up once everything written so far has been sent."""
        self._reason = "stopped"
        self._transport.close()

    def _beat(self) -> None:
        self._service.carry_out(self._sessions.beat(self, self._loop.time()))
        self._beating = self._loop.call_later(self._sessions.heartbeat_s, self._beat)
