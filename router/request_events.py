"""The events of a request's life: one value for each row of the table in `request_life.py`.

Two of the router's own events are used unchanged: `StreamUnread` and `StreamRead`.
"""

import msgspec

from ..core.messages import Leg
from ..core.request import FinishReason, Request
from .candidates import RoutingDecision
from .events import LossCause, StreamRead, StreamUnread
from .live_request import Dispatch, Job
from .stream import ChoiceStream


class Placed(msgspec.Struct, frozen=True):
    """Workers take one of the request's jobs, which has left the queue."""

    job: Job
    placement: RoutingDecision
    attempt: int


class LastToken(msgspec.Struct, frozen=True):
    """A choice has ended by itself: its stream has the last token, which `dispatch` has produced."""

    dispatch: Dispatch
    stream: ChoiceStream


class LegOver(msgspec.Struct, frozen=True):
    """A worker holds nothing for a leg any more: it has reported so, or is lost."""

    dispatch: Dispatch
    leg: Leg
    error: str | None
    is_invalid: bool = False  # the error is the request's own: no worker can carry it out
    is_peer_lost: bool = False  # its transfer broke: the other worker may have died
    loss: LossCause | None = None  # None: the worker is not lost


class Judged(msgspec.Struct, frozen=True):
    """It is known now whether the process of a lost worker died under the dispatch. `was_due`: its work has
    waited for that."""

    dispatch: Dispatch
    has_died: bool
    was_due: bool


class Survived(msgspec.Struct, frozen=True):
    """A worker has brought a suspect, alone, past the point where another one died. `moves_on`: it decodes
    elsewhere."""

    dispatch: Dispatch
    moves_on: bool


class Displaced(msgspec.Struct, frozen=True):
    """One of the request's dispatches makes room for another client."""

    dispatch: Dispatch


class GivenUp(msgspec.Struct, frozen=True):
    """An earlier router's dispatch is useless: others serve its choices, they have ended, or one of its legs
    is gone."""

    dispatch: Dispatch


class Due(msgspec.Struct, frozen=True):
    """A job of the request that backed off may be dispatched again."""


class CancelChoice(msgspec.Struct, frozen=True):
    """One choice ends by decision. Ignored when there is no such choice, or it has ended."""

    choice: int
    reason: FinishReason


class End(msgspec.Struct, frozen=True):
    """The whole request ends; `reason` is None when each choice has ended already."""

    reason: FinishReason | None
    error: str | None = None


class Claimed(msgspec.Struct, frozen=True):
    """The client of an adopted request is back, with `request`."""

    request: Request


class Abandoned(msgspec.Struct, frozen=True):
    """No client comes back for an adopted request."""


RequestEvent = (
    Placed
    | LastToken
    | LegOver
    | Judged
    | Survived
    | Displaced
    | GivenUp
    | Due
    | StreamUnread
    | StreamRead
    | CancelChoice
    | End
    | Claimed
    | Abandoned
)
