"""The states of a transfer's two ends and of their link: one table for each, followed by a
`core.automaton.Automaton`."""

import enum


class LinkState(enum.Enum):
    """The states of a pair's link, seen from either side."""

    DOWN = "down"
    CONNECTING = "connecting"  # P only
    UP = "up"


class OutboundState(enum.Enum):
    """The states of a transfer on P."""

    WAITING = "waiting"  # for the link
    OFFERED = "offered"
    SENDING = "sending"  # accepted
    COMMITTING = "committing"  # all is announced, COMMIT is sent
    SENT = "sent"
    FAILED = "failed"


class InboundState(enum.Enum):
    """The states of a transfer on D."""

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
