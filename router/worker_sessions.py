"""The router's side of its connections with workers: which peers are admitted, when a worker is ready, and
when silence means a loss.

UNPROVEN --Hello of an expected worker--> ADMITTED --Ready--> READY
    |                                        |                  |
    +----------------------------------------+------------------+--> CLOSING (we hung up) --> gone

A worker also hangs up, on a router that is silent for too long; it goes on with its work and reconnects. As
that is our own doing, the worker is then away, not lost. So is one that connects again before we have noticed
that its connection is broken.

Pure: the service feeds it from sockets, the simulator from its network. Connections are opaque to it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..core.handshake import MAX_UNPROVEN
from ..core.messages import (
    HEARTBEAT_S,
    ROUTER_SILENT_S,
    Failing,
    Heartbeat,
    HeldLeg,
    Hello,
    Holds,
    HostFull,
    LegEnded,
    LoadProgress,
    Probed,
    Ready,
    StepReport,
    WorkerMessage,
)
from .cores import Key
from .events import LossCause, WorkerAway, WorkerLost, WorkerReady
from .supervisor import ConnectionLost, WorkerProgress

CLOSED = "connection closed"  # by the peer
REPLACED = "it has connected again"
# A worker that is silent for this many beats of ours is lost: for 3 s, not counting how long we stood
# still ourselves.
MAX_SILENT_BEATS = 6
# between two beats of ours; workers may take us for dead then, and clocks differ a little
STOOD_STILL_S = 0.9 * ROUTER_SILENT_S


class SessionState(enum.Enum):
    """The progress of a connection."""

    UNPROVEN = "unproven"  # it has not introduced itself
    ADMITTED = "admitted"  # an expected worker, which may still be loading
    READY = "ready"  # it serves, and sends something at least every heartbeat
    CLOSING = "closing"  # we hung up; its messages are ignored


@dataclass(slots=True, eq=False)
class Session:
    """One connection. `key` is None until it is admitted."""

    beat_s: float  # our last beat
    state: SessionState = SessionState.UNPROVEN
    key: Key | None = None
    held: tuple[HeldLeg, ...] = ()  # reported before Ready
    num_beats_since_late: int | None = None  # since our last beat that came too late
    num_silent_beats: int = 0
    has_spoken: bool = False
    is_silent: bool = False  # the reason why we hung up
    has_failed: bool = False  # the worker said so
    reason: str = CLOSED  # until we hang up


C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Say(Generic[C]):
    connection: C
    message: Heartbeat


@dataclass(frozen=True, slots=True)
class HangUp(Generic[C]):
    """Closes a connection; answered by `WorkerSessions.closed`, as the end of every connection is."""

    connection: C


@dataclass(frozen=True, slots=True)
class ToRouter:
    event: WorkerReady | WorkerLost | WorkerAway | StepReport | LegEnded | Probed


@dataclass(frozen=True, slots=True)
class ToSupervisor:
    event: WorkerProgress | WorkerReady | ConnectionLost | HostFull


@dataclass(frozen=True, slots=True)
class Refused:
    """The peer is not, or not known to be, a worker that may serve. `is_harmless`: it only tested whether it
    reaches us, as joining hosts do; or it has the token, and was to end before it introduced itself."""

    reason: str
    is_harmless: bool


SessionCommand = Say[C] | HangUp[C] | ToRouter | ToSupervisor | Refused


class WorkerSessions(Generic[C]):
    """Owns the state of every connection to the workers' port."""

    def __init__(self, expects: Callable[[Key], bool]) -> None:
        """`expects`: whether a worker that identifies itself by this key may serve (`Supervisor.expects`)."""
        self.num_refused = 0  # connections whose peers did not authenticate in time
        self.heartbeat_s = HEARTBEAT_S  # between two calls of `beat`
        self._expects = expects
        self._sessions: dict[C, Session] = {}
        self._unproven: dict[C, None] = {}  # the oldest first
        self._workers: dict[Key, C] = {}

    @property
    def num_unproven(self) -> int:
        """The number of connections that have not introduced themselves yet."""
        return len(self._unproven)

    @property
    def connections(self) -> tuple[C, ...]:
        return tuple(self._sessions)

    def connection(self, key: Key) -> C | None:
        """Returns the worker's connection; None when its loss is being reported already."""
        return self._workers.get(key)

    def opened(self, connection: C, now_s: float) -> list[SessionCommand[C]]:
        """Records a new connection. Workers introduce themselves at once: when there are too many others, the
        oldest is closed."""
        commands: list[SessionCommand[C]] = []
        if len(self._unproven) >= MAX_UNPROVEN:
            oldest = next(iter(self._unproven))
            commands = self.hang_up(
                oldest, f"{MAX_UNPROVEN} newer connections have not introduced themselves yet"
            )
        self._sessions[connection] = Session(now_s)
        self._unproven[connection] = None
        return commands

    def heard(self, connection: C) -> None:
        """Records that something was received. It does not extend the time that a peer has for its Hello."""
        session = self._sessions[connection]
        session.has_spoken = True
        if session.state is not SessionState.UNPROVEN:
            session.num_silent_beats = 0

    def received(self, connection: C, message: WorkerMessage) -> list[SessionCommand[C]]:
        session = self._sessions[connection]
        match session.state:
            case SessionState.CLOSING:
                return []
            case SessionState.UNPROVEN:
                return self._introduce(connection, session, message)
            case SessionState.ADMITTED | SessionState.READY:
                return self._report(connection, session, message)

    def beat(self, connection: C, now_s: float) -> list[SessionCommand[C]]:
        """Sends heartbeats; hangs up on silent peers: not introduced in time, or ready once and frozen
        now."""
        session = self._sessions[connection]
        if session.state is SessionState.CLOSING:
            return []
        if now_s - session.beat_s > STOOD_STILL_S:
            session.num_beats_since_late = 0
        elif session.num_beats_since_late is not None:
            session.num_beats_since_late += 1
        session.beat_s = now_s
        session.num_silent_beats += 1
        if session.num_silent_beats > MAX_SILENT_BEATS and session.state is not SessionState.ADMITTED:
            session.is_silent = True
            return self.hang_up(connection, f"silent for {MAX_SILENT_BEATS * self.heartbeat_s:.1f} s")
        return [] if session.state is SessionState.UNPROVEN else [Say(connection, Heartbeat())]

    def hang_up(self, connection: C, reason: str, is_harmless: bool = False) -> list[SessionCommand[C]]:
        session = self._sessions[connection]
        if session.state is SessionState.CLOSING:
            return []
        refused = self._refuse(connection, Refused(reason, is_harmless))
        session.state, session.reason = SessionState.CLOSING, reason
        return [*refused, HangUp(connection)]

    def closed(self, connection: C, error: str | None, now_s: float) -> list[SessionCommand[C]]:
        """Handles the end of a connection; `error` is the cause, if it broke."""
        session = self._sessions.pop(connection)
        if session.key is None:
            is_harmless = not session.has_spoken and error is None
            return self._refuse(connection, Refused(error or session.reason, is_harmless))
        if self._workers.get(session.key) != connection:
            return []  # it was replaced
        del self._workers[session.key]
        reason = error or session.reason
        if session.state is SessionState.READY and self._is_our_doing(session, now_s):
            away = ConnectionLost(*session.key, reason, comes_back=True)
            return [ToRouter(WorkerAway(*session.key)), ToSupervisor(away)]
        lost = ConnectionLost(*session.key, reason, session.is_silent)
        cause = LossCause.GONE if session.state is SessionState.CLOSING else LossCause.UNKNOWN
        cause = LossCause.DIED if session.has_failed else cause
        return [ToRouter(WorkerLost(*session.key, reason, cause)), ToSupervisor(lost)]

    def _is_our_doing(self, session: Session, now_s: float) -> bool:
        """Whether the worker may have hung up since it heard nothing from us: we stand still, or did until
        just now, and our first beat since then crossed its farewell."""
        num_beats = session.num_beats_since_late
        return now_s - session.beat_s > STOOD_STILL_S or (
            num_beats is not None and num_beats < MAX_SILENT_BEATS
        )

    def _refuse(self, connection: C, refused: Refused) -> list[SessionCommand[C]]:
        """Refuses a peer, once, and only one that was not admitted."""
        if connection not in self._unproven:
            return []
        del self._unproven[connection]
        self.num_refused += 1
        return [refused]

    def _introduce(self, connection: C, session: Session, message: WorkerMessage) -> list[SessionCommand[C]]:
        if not isinstance(message, Hello):
            return self.hang_up(connection, "the first frame was not Hello")
        key = message.worker_id, message.incarnation
        name = f"{key[0]}/{key[1]}"
        if not self._expects(key):
            commands = self.hang_up(connection, f"it identifies as {name}, which is to end", is_harmless=True)
            if key not in self._workers:  # so its process has not died when its connection ended
                commands.append(ToRouter(WorkerLost(*key, "its connection broke", LossCause.GONE)))
            return commands
        old = self._workers.get(key)
        if (
            old is not None and self._sessions[old].state is SessionState.CLOSING
        ):  # its loss is to be reported
            return self.hang_up(connection, f"it identifies as {name}, on which we have just hung up")
        commands = [] if old is None else self._replace(old)
        session.state, session.key, session.num_silent_beats = SessionState.ADMITTED, key, 0
        self._workers[key] = connection
        del self._unproven[connection]
        return commands

    def _replace(self, old: C) -> list[SessionCommand[C]]:
        """Hangs up on a worker's earlier connection, whose end has not reached us yet: a worker dials again
        only when it has lost its router."""
        session = self._sessions[old]
        assert session.key is not None
        was_ready = session.state is SessionState.READY
        commands = self.hang_up(old, REPLACED)
        if was_ready:
            away = ConnectionLost(*session.key, REPLACED, comes_back=True)
            commands += [ToRouter(WorkerAway(*session.key)), ToSupervisor(away)]
        return commands

    def _report(self, connection: C, session: Session, message: WorkerMessage) -> list[SessionCommand[C]]:
        match message:
            case StepReport() | LegEnded() | Probed():
                return [ToRouter(message)]
            case LoadProgress():
                progress = WorkerProgress(
                    message.worker_id, message.incarnation, message.phase, message.fraction
                )
                return [ToSupervisor(progress)]
            case HostFull():
                return [ToSupervisor(message)]
            case Failing(reason=reason):
                session.has_failed = True
                return self.hang_up(connection, reason)
            case Holds(held=held):
                session.held += held
                return []
            case Ready(info=info, held=held, num_cached_blocks=num_cached_blocks):
                session.state = SessionState.READY
                if not self._expects((info.worker_id, info.incarnation)):
                    return []
                ready = WorkerReady(info, session.held + held, num_cached_blocks)
                return [ToRouter(ready), ToSupervisor(ready)]
            case Hello():
                return self.hang_up(connection, "it introduced itself twice")
