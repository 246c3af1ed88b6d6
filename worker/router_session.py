"""A worker's side of its connections with the router: when to dial, how to greet, when a router is lost, when
to give up.

SEEKING --connected--> CONNECTED --loaded, greeting--> GREETED
   ^                        |                             |
   +----------lost----------+-----------------------------+
   |
   +--no router for too long--> the worker ends

Pure: the worker's process drives it over sockets and threads, the simulator over its network. In the process
`heard` comes from the reader's thread, `progress`, `loaded` and `greeting` from the engine's, the rest from
whichever thread dials; no two of them write the same field.
"""

from collections.abc import Iterable

from ..core.messages import (
    ROUTER_SILENT_S,
    Failing,
    HeldLeg,
    Hello,
    Holds,
    LoadProgress,
    Ready,
    WorkerInfo,
)
from .held_legs import MAX_FRAME_TOKENS, in_frames

DEAD_AFTER_S = ROUTER_SILENT_S
RECONNECT_S = 0.1  # between two attempts to reach a router
BRIEF_S = 1.0  # a connection that lasted less was refused
ROUTER_LOST_TIMEOUT_S = 30.0  # how long a worker continues without a router


class RouterSilence:
    """Measures how long a router has been silent, on one connection."""

    def __init__(self, now_s: float) -> None:
        self.dead_after_s = DEAD_AFTER_S
        self._heard_s = now_s

    def heard(self, now_s: float) -> None:
        """A message of any kind has arrived."""
        self._heard_s = now_s

    def is_lost(self, now_s: float) -> bool:
        """Returns whether to disconnect; called at each heartbeat."""
        return now_s - self._heard_s > self.dead_after_s


class RouterSession:
    """Owns a worker's knowledge of its routers, one after the other, from its start to its end."""

    def __init__(
        self, worker_id: str, incarnation: int, now_s: float, max_frame_tokens: int = MAX_FRAME_TOKENS
    ) -> None:
        # the first frame of every connection
        self.hello = Hello(worker_id=worker_id, incarnation=incarnation)
        self._max_frame_tokens = max_frame_tokens
        # when a router was reached, and when one was last connected
        self._connected_s = self._served_s = now_s
        self._loading: LoadProgress | None = None  # the last report
        self.is_loaded = False
        self._greeted: object = None  # the connection

    def may_dial(self, now_s: float) -> bool:
        """Whether to dial again; False when no router has answered for too long: the worker ends."""
        return now_s - self._served_s < ROUTER_LOST_TIMEOUT_S

    def connected(self, now_s: float) -> None:
        """A router of this cluster has answered."""
        self._connected_s = now_s

    def lost(self, now_s: float) -> None:
        """The connection is gone; dials again after `RECONNECT_S`."""
        if now_s - self._connected_s > BRIEF_S:
            self._served_s = now_s

    def progress(self, phase: str, fraction: float) -> LoadProgress:
        """Records and returns the progress of loading, for the connected router."""
        self._loading = LoadProgress(
            worker_id=self.hello.worker_id, incarnation=self.hello.incarnation, phase=phase, fraction=fraction
        )
        return self._loading

    def loaded(self) -> None:
        """The worker has loaded: from now on every connection is greeted."""
        self.is_loaded = True

    def catch_up(self) -> LoadProgress | None:
        """Returns the progress for a router that is reached while the worker loads; None when there is
        nothing to report, or a greeting is due."""
        return None if self.is_loaded else self._loading

    def greeting(
        self, connection: object, info: WorkerInfo, held: Iterable[HeldLeg], num_cached_blocks: int
    ) -> list[Holds | Ready]:
        """Returns the worker's identity and all that it holds, on which all later reports build. Once for
        each connection."""
        if connection is self._greeted:
            return []
        self._greeted = connection
        *before, last = in_frames(tuple(held), self._max_frame_tokens)
        return [
            *(Holds(held=legs) for legs in before),
            Ready(info=info, held=last, num_cached_blocks=num_cached_blocks),
        ]

    def failing(self, reason: str) -> Failing | None:
        """Returns what the router is to hear before anything else when the worker fails; None while it loads:
        a failed start reports by its process's end."""
        if not self.is_loaded:
            return None
        return Failing(worker_id=self.hello.worker_id, incarnation=self.hello.incarnation, reason=reason)
