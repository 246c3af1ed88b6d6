"""One transfer as its receiver sees it: the reserved blocks and their lease, and the parts that have
arrived."""

import math

from ..core.automaton import Automaton
from ..core.request import TransferId
from .config import TransferConfig
from .events import Expect
from .span import Coverage, Span
from .states import INBOUND_TRANSITIONS, InboundState


class InboundTransfer:
    """D's view of one transfer: begun by an offer or by a reservation, under way once it has both."""

    def __init__(self, transfer: TransferId, initial: InboundState, now_s: float) -> None:
        self.id = transfer
        self.machine = Automaton(INBOUND_TRANSITIONS, initial, name=f"inbound {transfer}")
        self.since_s = now_s
        self.reservation: Expect | None = None
        self.num_offered_tokens = 0
        self.payload: bytes | None = None
        self.num_unstored = 0  # chunks announced and not yet in the blocks
        self._coverage: Coverage | None = None

    @property
    def state(self) -> InboundState:
        return self.machine.state

    @property
    def block_ids(self) -> tuple[int, ...]:
        assert self.reservation is not None
        return self.reservation.block_ids

    @property
    def mark(self) -> int:
        assert self.reservation is not None
        return self.reservation.mark

    @property
    def num_cached_tokens(self) -> int:
        assert self.reservation is not None
        return self.reservation.num_cached_tokens

    def lease_ends_s(self, heard_s: float, config: TransferConfig) -> float:
        """Returns when to give up waiting for offer and reservation to meet, if the peer's last message
        arrived at `heard_s`; once they have met, never."""
        if self.state not in (InboundState.EXPECTED, InboundState.OFFERED):
            return math.inf
        return min(max(self.since_s, heard_s) + config.lease_s, self.since_s + config.max_lease_s)

    def begin(self, num_layers: int) -> None:
        """Returns whether both offer and reservation are here. Raises ValueError when they do not fit."""
        reserved = self.reservation
        assert reserved is not None
        self.machine.transition(InboundState.RECEIVING)
        if reserved.num_tokens != self.num_offered_tokens:
            raise ValueError(
                f"{self.num_offered_tokens} tokens were offered, {reserved.num_tokens} are expected"
            )
        self._coverage = Coverage(Span(0, num_layers, reserved.num_cached_tokens, reserved.num_tokens))

    def announced(self, span: Span) -> None:
        """Raises ValueError when part of `span` has arrived before or was not asked for."""
        assert self._coverage is not None
        self._coverage.add(span)
        self.num_unstored += 1

    @property
    def num_missing(self) -> int:
        assert self._coverage is not None
        return self._coverage.num_missing

    @property
    def is_complete(self) -> bool:
        return self.state is InboundState.COMMITTING and self.num_unstored == 0
