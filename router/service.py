"""The router's shell: clients' streams on one side, workers' connections on the other, the pure router in between.

Runs on one asyncio loop. Every event goes through `RouterService.handle`, which carries out the commands before it returns.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import AsyncGenerator
from typing import Protocol

from ..core.codec import FrameDecoder, FrameEncoder, FrameError
from ..core.errors import DuplicateRequest
from ..core.handshake import Acceptor, HandshakeError, HandshakeStream, Purpose
from ..core.messages import (
    Heartbeat,
    HeldLeg,
    Hello,
    Holds,
    LegEnded,
    LoadProgress,
    Ready,
    StepReport,
    WorkerInfo,
    WorkerMessage,
)
from ..core.peer_log import peer_log
from ..core.request import FinishReason, Request
from .client_stream import ClientStream, StreamEvent
from .core import Router
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
    WorkerLost,
    WorkerReady,
)
from .recorder import Recorder

log = logging.getLogger(__name__)

CLOSED = "connection closed"  # by the peer
HEARTBEAT_S = 0.5  # so often do both sides speak at least
# A worker that says nothing between so many beats of ours is lost: for 3 s, not counting how long we stood still ourselves.
MAX_SILENT_BEATS = 6
MAX_UNPROVEN = 256  # connections whose peers have not proved yet that they are workers of this cluster


class WorkerObserver(Protocol):
    """Who wants to know how workers fare: the fleet's controller."""

    def expects(self, worker_id: str, incarnation: int) -> bool:
        """Whether it was started, lives as far as we know, and was not told to stop."""
        ...

    def worker_progress(self, worker_id: str, incarnation: int, phase: str, fraction: float) -> None: ...
    def worker_ready(self, info: WorkerInfo) -> None: ...
    def worker_lost(self, worker_id: str, incarnation: int, reason: str, is_silent: bool) -> None: ...
    def worker_idle(self, worker_id: str, incarnation: int) -> None: ...


class RouterService:
    """Carries events to the router and its commands to streams and workers."""

    def __init__(self, router: Router, observer: WorkerObserver, token: str, recorder: Recorder | None = None) -> None:
        self.router = router
        self._observer = observer
        self._recorder = recorder
        self.token = token
        self.num_refused = 0  # connections that did not prove in time that they are workers of this cluster
        self._unproven: dict[_WorkerConnection, None] = {}  # the oldest first
        self._streams: dict[str, ClientStream] = {}
        self._workers: dict[tuple[str, int], _WorkerConnection] = {}
        self._commands: deque[RouterCommand] = deque()
        self._is_busy = False  # with commands
        self._server: asyncio.Server | None = None
        self._tick: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int = 0, listener: socket.socket | None = None) -> int:
        """Accept workers on `port` of `host`, or a free one, or on a `listener`; returns the port."""
        loop = asyncio.get_running_loop()
        if listener is None:
            self._server = await loop.create_server(lambda: _WorkerConnection(self), host, port)
        else:
            self._server = await loop.create_server(lambda: _WorkerConnection(self), sock=listener)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close every connection. Streams have been closed before, by the door that opened them."""
        if self._tick is not None:
            self._tick.cancel()
        if self._server is not None:
            self._server.close()
        for connection in [*self._workers.values(), *self._unproven]:
            connection.close()

    async def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The request's stream: tokens, the end of each choice, then one EmitEnd. Closing the iterator cancels.

        Raises QueueFull, DuplicateRequest or NoWorkerAvailable before the first event.
        """
        if request.request_id in self._streams:
            raise DuplicateRequest(request.request_id)
        stream = self._streams[request.request_id] = ClientStream()
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
            if stream.is_handed_over and not ended:  # one that was refused may have the name of another's live request
                self.handle(Cancel(request.request_id))

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it because its stop string was found."""
        reason = FinishReason.CANCELLED if choice is None else FinishReason.STOP
        self.handle(Cancel(request_id, reason, choice))

    def handle(self, event: RouterEvent) -> None:
        """One event through the router, its commands carried out. An observer may call this from within a command; what
        follows from that is carried out after the commands that were decided before."""
        loop = asyncio.get_running_loop()
        if self._recorder is not None:
            self._recorder.observe(event)
        self._commands += self.router.handle(event, loop.time())
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._commands:
                self._carry_out(self._commands.popleft())
        finally:
            self._is_busy = False
        self._schedule_tick(loop)

    def _carry_out(self, command: RouterCommand) -> None:
        match command:
            case SendCommand(worker_id, incarnation, message):
                connection = self._workers.get((worker_id, incarnation))
                if connection is not None:  # else its loss is being reported already
                    connection.send(message)
            case EmitTokens() | EmitChoiceEnd() | EmitEnd():
                stream = self._streams.get(command.request_id)
                if stream is not None:
                    self._feed(stream, command)
            case WorkerIdle(worker_id, incarnation):
                self._observer.worker_idle(worker_id, incarnation)
            case RequestClosed(_, timeline):
                if self._recorder is not None:
                    self._recorder.closed(timeline)

    def _feed(self, stream: ClientStream, event: StreamEvent) -> None:
        """More for a client. When one has left too much unread, its request leaves the workers, and comes back when
        half of that is read. What it is handed at once because it comes back does not count."""
        stream.put(event)
        if not stream.is_unread and stream.num_unread > self.router.config.max_unread_tokens:
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

    # what a worker's connection reports

    def admit(self, connection: "_WorkerConnection", hello: Hello) -> bool:
        """Whether the peer is a worker that we are waiting for."""
        key = hello.worker_id, hello.incarnation
        is_new = self._observer.expects(*key) and key not in self._workers
        if not is_new:
            log.warning("refused a worker that calls itself %s/%d", *key, extra={"worker": hello.worker_id})
            return False
        self._workers[key] = connection
        return True

    @property
    def num_unproven(self) -> int:
        """Connections that have not introduced themselves yet."""
        return len(self._unproven)

    def introduced(self, connection: "_WorkerConnection") -> None:
        self._unproven.pop(connection, None)

    def met(self, connection: "_WorkerConnection") -> None:
        """A new connection. Workers introduce themselves at once: when there are too many others, the oldest goes."""
        if len(self._unproven) >= MAX_UNPROVEN:
            next(iter(self._unproven)).refuse(f"{MAX_UNPROVEN} newer connections have not introduced themselves yet")
        self._unproven[connection] = None

    def refused(self, connection: "_WorkerConnection", reason: str, level: int = logging.WARNING) -> None:
        """The peer is not, or not known to be, a worker of this cluster. Idempotent."""
        if connection in self._unproven:
            del self._unproven[connection]
            self.num_refused += 1
            peer_log.log(level, "refused a connection to the workers' port: %s", reason)

    def receive(self, message: LoadProgress | Ready | StepReport | LegEnded) -> None:
        """One message of an admitted worker."""
        match message:
            case LoadProgress():
                self._observer.worker_progress(message.worker_id, message.incarnation, message.phase, message.fraction)
            case Ready():
                if self._observer.expects(message.info.worker_id, message.info.incarnation):
                    self.handle(WorkerReady(message.info, message.held))
                    self._observer.worker_ready(message.info)
            case _:
                self.handle(message)

    def lost(self, worker_id: str, incarnation: int, reason: str, is_silent: bool) -> None:
        """The connection to an admitted worker is gone; `is_silent`: by us, because nothing came any more."""
        del self._workers[worker_id, incarnation]
        self.handle(WorkerLost(worker_id, incarnation, reason))
        self._observer.worker_lost(worker_id, incarnation, reason, is_silent)


class _WorkerConnection(asyncio.Protocol):
    """One worker's control connection: a handshake, Hello, then reports up and commands down."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._handshake = HandshakeStream(Acceptor(service.token, Purpose.CONTROL))
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[WorkerMessage] = FrameDecoder(WorkerMessage)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from connection_made on, which is called first
        self._hello: Hello | None = None
        self._ready = False
        self._held: tuple[HeldLeg, ...] = ()  # told before Ready
        self._num_silent_beats = 0
        self._reason = CLOSED  # until we hang up
        self._has_spoken = False
        self._is_silent = False
        self._watchdog: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._watchdog = self._loop.call_later(HEARTBEAT_S, self._beat)
        self._service.met(self)

    def data_received(self, data: bytes) -> None:
        self._has_spoken = True
        if self._hello is not None:  # before that a peer has its time, however it speaks
            self._num_silent_beats = 0
        try:
            answer, frames = self._handshake.feed(data)
            self._transport.write(answer)
            for message in self._decoder.feed(frames):
                self._on_message(message)
        except (FrameError, HandshakeError) as error:
            self._abort(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._hello is None:
            # hosts that join try whether they reach us, and say nothing
            was_a_try = not self._has_spoken and exc is None and self._reason == CLOSED
            self._service.refused(self, str(exc or self._reason), logging.DEBUG if was_a_try else logging.WARNING)
        else:
            reason = str(exc) if exc else self._reason
            self._service.lost(self._hello.worker_id, self._hello.incarnation, reason, self._is_silent)

    def send(self, message: object) -> None:
        self._transport.write(self._encoder.encode(message))

    def close(self) -> None:
        self._reason = "stopped"
        self._transport.close()

    def refuse(self, reason: str) -> None:
        """Hang up on a peer that has not introduced itself."""
        self._service.refused(self, reason)
        self._abort(reason)

    def _on_message(self, message: WorkerMessage) -> None:
        if isinstance(message, Hello):
            if self._hello is None and self._service.admit(self, message):
                self._hello = message
                self._service.introduced(self)
            else:
                self._abort("not a worker of this cluster")
        elif self._hello is None:
            self._abort("the first frame was not Hello")
        elif not self._transport.is_closing():
            if isinstance(message, Holds):
                self._held += message.held
                return
            if isinstance(message, Ready):
                message, self._ready = Ready(info=message.info, held=self._held + message.held), True
            self._service.receive(message)

    def _abort(self, reason: str) -> None:
        self._reason = reason
        self._transport.abort()

    def _beat(self) -> None:
        """Say that we live; hang up on a peer that is silent: not introduced in time, or ready once and frozen now."""
        self._num_silent_beats += 1
        if self._num_silent_beats > MAX_SILENT_BEATS and (self._hello is None or self._ready):
            self._is_silent = True
            self._abort(f"silent for {MAX_SILENT_BEATS * HEARTBEAT_S:.1f} s")
            return
        if self._hello is not None:
            self.send(Heartbeat())
        self._watchdog = self._loop.call_later(HEARTBEAT_S, self._beat)
