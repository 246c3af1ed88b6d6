"""The router's inputs and outputs. Values only: the shell carries them.

`Router.handle(event, now_s)` takes a `RouterEvent` and returns `RouterCommand`s in the order of execution.
Workers' `StepReport`s and `LegEnded`s are events just as they come off the wire."""

import enum

import msgspec

from ..core.messages import (
    HeldLeg,
    LegEnded,
    Probed,
    Role,
    StepReport,
    TokenOutput,
    WorkerCommand,
    WorkerInfo,
)
from ..core.request import FinishReason, Request


class Submit(msgspec.Struct, frozen=True):
    """A client's request. `handle` raises Overloaded, DuplicateRequest or NoWorkerAvailable when it is not
    admitted.

    When an earlier router served the very same request under this id, it continues; its stream begins with
    token 0 nevertheless."""

    request: Request


class Cancel(msgspec.Struct, frozen=True):
    """Ends a request, or one `choice` of it (a stop string was found: reason STOP). Unknown ones are
    ignored."""

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED
    choice: int | None = None


class StreamUnread(msgspec.Struct, frozen=True):
    """The request's client leaves too much unread: the request takes no room at workers and gets no token
    until `StreamRead`. Unknown ones are ignored."""

    request_id: str


class StreamRead(msgspec.Struct, frozen=True):
    """The client of an unread request reads again. Others are ignored."""

    request_id: str


class Closing(msgspec.Struct, frozen=True):
    """The cluster shuts down: no more requests are admitted; running ones may finish."""


class WorkerReady(msgspec.Struct, frozen=True):
    """A worker serves from now on. A higher incarnation of a known worker means that the previous one is
    lost. `held` lists its legs for an earlier router, or for this one, if the worker was away."""

    info: WorkerInfo
    held: tuple[HeldLeg, ...] = ()
    num_cached_blocks: int = 0  # which its reports will name


class LossCause(enum.Enum):
    """Why nothing more comes from a worker."""

    GONE = "gone"  # it fell silent, was cut off, or was to end: no request is to blame
    UNKNOWN = "unknown"  # its connection ended: another `WorkerLost` follows when the cause is known
    DIED = "died"  # its process ended by itself, or its engine failed: one of its requests may be to blame


class WorkerLost(msgspec.Struct, frozen=True):
    """A worker died, froze or was stopped: nothing more comes from this incarnation. Of one that is lost
    already only the cause is news. Unknown ones are ignored."""

    worker_id: str
    incarnation: int
    reason: str = "lost"
    cause: LossCause = LossCause.GONE


class WorkerAway(msgspec.Struct, frozen=True):
    """A worker hung up on us, as we had stood still, or has connected again before we had noticed the end of
    its connection: it goes on with its legs, and is expected back. `WorkerReady` of the same incarnation
    follows, or `WorkerLost`. Unknown ones are ignored."""

    worker_id: str
    incarnation: int


class WorkerDraining(msgspec.Struct, frozen=True):
    """The worker gets no new work; `WorkerIdle` follows when its last leg has ended. Unknown ones are
    ignored."""

    worker_id: str


class WorkerRole(msgspec.Struct, frozen=True):
    """The worker serves as `role` from now on, even if it was draining. Its streams continue undisturbed."""

    worker_id: str
    role: Role


class WorkersExpected(msgspec.Struct, frozen=True):
    """The number of workers that are starting or being replaced: while it is positive, requests may wait for
    them."""

    num_workers: int


class Adopted(msgspec.Struct, frozen=True):
    """Every worker of an earlier router has become ready or is given up: nothing else is left to take
    over."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed: deadlines and delayed retries are checked. Due by `Router.next_tick_s()`."""


RouterEvent = (
    Submit
    | Cancel
    | StreamUnread
    | StreamRead
    | Closing
    | WorkerReady
    | WorkerLost
    | WorkerAway
    | WorkerDraining
    | WorkerRole
    | WorkersExpected
    | Adopted
    | StepReport
    | LegEnded
    | Probed
    | Tick
)


class ConsideredPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A place that was weighed for a dispatch, with the deciding figures: in this order, the smaller the
    better."""

    prefill_worker: str
    decode_worker: str | None
    has_failed: bool  # this request failed there before
    itl_excess_s: float  # by which a gap between tokens there exceeds the SLO
    cost_s: (
        float  # to the first token and until the KV has arrived; a prefill on a decode worker counts for more
    )
    load: float  # of the decode worker
    ttft_s: float


class DispatchTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One dispatch of a request in its timeline. `*_s` instants are on the router's clock; `expected_*` are
    predictions from when it was placed."""

    attempt: int  # of this request's
    number: int  # of all dispatches: the attempt as workers know it
    choices: tuple[int, ...]
    prefill_worker: str
    # None: nothing to decode; equal to `prefill_worker`: one worker served both phases
    decode_worker: str | None
    num_tokens: int  # prompt, and output of earlier attempts
    expected_cached_tokens: int  # on the prefill worker, by the prefix index
    expected_ttft_s: float  # from dispatch to first token
    expected_queue_s: float = 0.0  # of that, in the prefill worker's queue
    expected_transfer_s: float = 0.0  # from the end of the prefill until the KV has arrived
    expected_itl_s: float = 0.0  # between two tokens
    considered: tuple[ConsideredPlace, ...] = ()  # the best few places, this one first
    queued_s: float
    dispatched_s: float
    first_token_s: float | None = None
    ended_s: float | None = None  # its last token, or its failure; None while it runs
    num_steps: int = 0  # tokens of the choice that got the most
    failure: str | None = None  # why it did not finish its work
    # the workers' own account (queue, compute, cached tokens, transfer), once it has arrived
    prefill: LegEnded | None = None
    decode: LegEnded | None = None


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went."""

    request_id: str
    submitted_s: float
    first_token_s: float | None
    ended_s: float
    dispatches: tuple[DispatchTimes, ...]
    finish_reasons: tuple[FinishReason | None, ...] = (None,)  # of each choice; None while it runs
    error: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: tuple[int, ...] = (0,)  # of each choice
    client: str = ""  # whom it counted for; not known of an adopted request
    user: str = ""
    traceparent: str = ""
    num_times_unread: int = 0  # each time, the request left its workers
    # an earlier router took it: instants before the take-over are those of the take-over
    is_adopted: bool = False

    @property
    def outcome(self) -> FinishReason | None:
        """Returns the request's ending, given those of its choices; None while it runs."""
        if None in self.finish_reasons:
            return None
        return max((reason for reason in self.finish_reasons if reason is not None), key=_WORST_LAST.index)


_WORST_LAST = list(FinishReason)


class SendCommand(msgspec.Struct, frozen=True):
    """Sends `command` to this incarnation of the worker; if that fails, the shell reports `WorkerLost`."""

    worker_id: str
    incarnation: int
    command: WorkerCommand


class EmitTokens(msgspec.Struct, frozen=True, gc=False):
    """The next tokens of one choice: indices are contiguous over all the choice's EmitTokens."""

    request_id: str
    choice: int
    tokens: tuple[TokenOutput, ...]


class EmitChoiceEnd(msgspec.Struct, frozen=True):
    """A choice's only ending, after its last token."""

    request_id: str
    choice: int
    finish_reason: FinishReason


class EmitEnd(msgspec.Struct, frozen=True):
    """A request's only ending, after those of all its choices.

    `finish_reason` is None when every choice ended by itself, else CANCELLED, DEADLINE, INVALID, ERROR or
    FATAL (the last three with `error`: INVALID_ARGUMENT, UNAVAILABLE and INTERNAL to clients). The timeline
    holds what is known now; workers' accounts of the last legs may arrive later."""

    request_id: str
    finish_reason: FinishReason | None
    error: str | None
    timeline: Timeline


StreamCommand = EmitTokens | EmitChoiceEnd | EmitEnd


class RequestClosed(msgspec.Struct, frozen=True):
    """No worker holds anything for the request any more; the timeline is complete. For traces and metrics."""

    request_id: str
    timeline: Timeline


class WorkerIdle(msgspec.Struct, frozen=True):
    """A draining worker holds no leg any more and may be stopped."""

    worker_id: str
    incarnation: int


RouterCommand = SendCommand | StreamCommand | RequestClosed | WorkerIdle
