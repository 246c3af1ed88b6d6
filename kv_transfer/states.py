"""The states of a transfer's two ends and of their link: one table per machine, and the only writer of a state."""

import enum
from collections import deque
from collections.abc import Mapping
from typing import Generic, TypeVar

from ..core.errors import InvalidTransition


class LinkState(enum.Enum):
    """Of one pair, seen from either side."""

    DOWN = "down"
    CONNECTING = "connecting"  # P only
    UP = "up"


class OutboundState(enum.Enum):
    """Of one transfer, on P."""

    WAITING = "waiting"  # for the link
    OFFERED = "offered"
    SENDING = "sending"  # accepted
    COMMITTING = "committing"  # all is announced, COMMIT is sent
    SENT = "sent"
    FAILED = "failed"


class InboundState(enum.Enum):
    """Of one transfer, on D."""

    EXPECTED = "expected"  # blocks, no offer
    OFFERED = "offered"  # an offer, no blocks
    RECEIVING = "receiving"
    COMMITTING = "committing"  # all is announced, the last chunks are being stored
    RECEIVED = "received"
    FAILED = "failed"


LINK_TRANSITIONS = {
    LinkState.DOWN: {LinkState.CONNECTING, LinkState.UP},
    LinkState.CONNECTING: {LinkState.UP, LinkState.DOWN},
    LinkState.UP: {LinkState.DOWN},
}
OUTBOUND_TRANSITIONS = {
    OutboundState.WAITING: {OutboundState.OFFERED, OutboundState.FAILED},
    OutboundState.OFFERED: {OutboundState.SENDING, OutboundState.FAILED},
    OutboundState.SENDING: {OutboundState.COMMITTING, OutboundState.FAILED},
    OutboundState.COMMITTING: {OutboundState.SENT, OutboundState.FAILED},
    OutboundState.SENT: set(),
    OutboundState.FAILED: set(),
}
INBOUND_TRANSITIONS = {
    InboundState.EXPECTED: {InboundState.RECEIVING, InboundState.FAILED},
    InboundState.OFFERED: {InboundState.RECEIVING, InboundState.FAILED},
    InboundState.RECEIVING: {InboundState.COMMITTING, InboundState.FAILED},
    InboundState.COMMITTING: {InboundState.RECEIVED, InboundState.FAILED},
    InboundState.RECEIVED: set(),
    InboundState.FAILED: set(),
}

S = TypeVar("S", bound=enum.Enum)


class Machine(Generic[S]):
    """A state and its recent history."""

    def __init__(self, name: str, transitions: Mapping[S, set[S]], initial: S) -> None:
        self._name = name
        self._transitions = transitions
        self._state = initial
        self._history: deque[str] = deque([initial.value], maxlen=16)

    @property
    def state(self) -> S:
        return self._state

    def transition(self, target: S) -> None:
        """The only writer of the state. Raises InvalidTransition."""
        if target not in self._transitions[self._state]:
            raise InvalidTransition(self._name, self._state, target, list(self._history))
        self._state = target
        self._history.append(target.value)
