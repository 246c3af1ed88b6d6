"""P's decisions while it connects to D, from its greeting until the link is up.

GREETED --Prepare--> BUILDING --Connected--> UP      a refusal, a loss or another answer ends the attempt

Pure: `dialler` drives it over sockets, the simulator over its network."""

import enum
from typing import TypeVar

from ..core.automaton import Automaton
from .choice import GROUP_LINKS
from .config import TransferConfig
from .link import LinkError
from .protocol import Connected, LinkRefused, Meet, Prepare, ReceiverMessage

Answer = ReceiverMessage | LinkError
M = TypeVar("M", Prepare, Connected)


class ConnectState(enum.Enum):
    """The stages of a connection."""

    GREETED = "greeted"
    BUILDING = "building"
    UP = "up"


TRANSITIONS = {
    ConnectState.GREETED: {ConnectState.BUILDING},
    ConnectState.BUILDING: {ConnectState.UP},
    ConnectState.UP: set[ConnectState](),
}


class Connecting(Automaton[ConnectState]):
    """One attempt, over a link of kind `link`."""

    def __init__(self, link: str, config: TransferConfig) -> None:
        super().__init__(TRANSITIONS, ConnectState.GREETED, name=f"connecting over {link}")
        self._is_group = link in GROUP_LINKS
        self.timeout_s = config.connect_timeout_s
        # from D's ring on; None: within the first timeout
        self.build_timeout_s = config.build_timeout_s(link) if self._is_group else None

    def prepared(self, answer: Answer) -> Prepare:
        """D has answered the greeting; returns its ring, on which P builds its end. Raises LinkError."""
        prepare = _expected(answer, Prepare)
        self.transition(ConnectState.BUILDING)
        return prepare

    def built(self, answer: Answer) -> Meet | None:
        """D has answered while the link is built; returns an entry of the meeting, None when D's end is up.
        Raises LinkError."""
        if self._is_group and isinstance(answer, Meet):
            return answer
        _expected(answer, Connected)
        self.transition(ConnectState.UP)
        return None

    @property
    def expired(self) -> str:
        """The error of an attempt that took too long."""
        return f"no answer within {self.timeout_s} s, or no link in its time"


def _expected(answer: Answer, kind: type[M]) -> M:
    if isinstance(answer, LinkError):
        raise answer
    if isinstance(answer, LinkRefused):
        raise LinkError(f"refused: {answer.error}")
    if not isinstance(answer, kind):
        raise LinkError(f"the peer answered {type(answer).__name__}, expected {kind.__name__}")
    return answer
