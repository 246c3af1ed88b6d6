"""One name in the fleet and its life.

STARTING -> READY -> DRAINING -> STOPPING -> gone
    |  ^      |                      +-----> DRAINED   (by hand: stays out until the next Apply)
    v  |      v
   BACKOFF <--+  lost: the same name comes back as a new incarnation, later after each failure in a row
"""

import enum
from dataclasses import dataclass

from ..core.automaton import Automaton
from ..core.messages import Role


class MemberState(enum.Enum):
    """The stages of a fleet member's life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    DRAINED = "drained"
    GONE = "gone"


TRANSITIONS = {
    MemberState.STARTING: {MemberState.READY, MemberState.BACKOFF, MemberState.STOPPING},
    MemberState.READY: {MemberState.DRAINING, MemberState.BACKOFF},
    MemberState.DRAINING: {MemberState.READY, MemberState.STOPPING, MemberState.DRAINED, MemberState.GONE},
    MemberState.STOPPING: {MemberState.DRAINED, MemberState.GONE},
    MemberState.BACKOFF: {MemberState.STARTING, MemberState.DRAINED, MemberState.GONE},
    MemberState.DRAINED: {MemberState.GONE},
    MemberState.GONE: set[MemberState](),
}


@dataclass(slots=True)
class Member(Automaton[MemberState]):
    """One name in the fleet, through all its incarnations."""

    worker_id: str
    role: Role
    incarnation: int
    since_s: float  # when it entered its state
    num_failures: int = 0  # consecutive
    num_restarts: int = 0  # in total
    last_error: str | None = None
    due_s: float | None = None  # BACKOFF: next start; STARTING: next beat; DRAINING: patience ends
    by_hand: bool = False  # drained by an operator
    is_replaced: bool = False  # draining, and another takes its place: it must not return
    is_awaited: bool = False  # started by an earlier controller, has not reported yet
    beat_s: float = 0.0  # STARTING: patience is counted in beats, as a delay of our own counts as one
    num_beats_left: int = 0
    progress: object = None  # STARTING: the last report of its progress

    def __post_init__(self) -> None:
        Automaton.__init__(self, TRANSITIONS, MemberState.STARTING, at_s=self.since_s)

    def __str__(self) -> str:
        return f"member {self.worker_id}"

    def wait(self, beat_s: float, num_beats: int, now_s: float) -> None:
        """STARTING: gives it so many beats from now on."""
        self.beat_s, self.num_beats_left, self.due_s = beat_s, num_beats, now_s + beat_s

    def enter(self, target: MemberState, now_s: float, due_s: float | None = None) -> None:
        self.transition(target, now_s)
        self.since_s, self.due_s = now_s, due_s


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member's row in `pdserve status`."""

    worker_id: str
    role: Role
    state: MemberState
    incarnation: int
    since_s: float
    num_failures: int
    num_restarts: int
    last_error: str | None
    due_s: float | None
