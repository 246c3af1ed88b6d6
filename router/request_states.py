"""The states of a request and their transitions (drawn in `docs/architecture.md`). Reactions in each state
are in `request_life.py`.

QUEUED, RUNNING and BACKING_OFF state where the work is that its client waits for. Its choices may be in
several places at once: RUNNING takes precedence over QUEUED, and QUEUED over BACKING_OFF."""

import enum


class RequestState(enum.Enum):
    """The holder of the request."""

    QUEUED = "queued"  # the queue: some of its work may be dispatched, and workers have none
    RUNNING = "running"  # workers have some of its work
    BACKING_OFF = "backing off"  # the queue: its remaining work is due soon, or awaits a verdict
    UNREAD = "unread"  # nobody: its client does not read, and its work is set aside
    UNCLAIMED = "unclaimed"  # workers, maybe: an earlier router had it, and its client has not come back yet
    UNDELIVERED = "undelivered"  # it has ended unclaimed, and its whole stream is kept for its client
    ENDED = "ended"  # its client has its ending; workers may still hold something for it
    CLOSED = "closed"  # nobody

    __hash__ = object.__hash__  # as each is one object; Enum's own runs in Python

    def __init__(self, value: str) -> None:  # attributes, as every event asks for them
        # no more tokens will come
        self.is_over = value in ("undelivered", "ended", "closed")
        # the stream goes to a client, and is not kept for one
        self.has_client = value not in ("unclaimed", "undelivered")
        # the work is in the queue or at workers: the state follows from its location
        self.is_served = value in ("queued", "running", "backing off")


_LEAVES = {RequestState.UNREAD, RequestState.ENDED}
TRANSITIONS = {
    RequestState.QUEUED: {RequestState.RUNNING, RequestState.BACKING_OFF, *_LEAVES},
    RequestState.RUNNING: {RequestState.QUEUED, RequestState.BACKING_OFF, *_LEAVES},
    RequestState.BACKING_OFF: {RequestState.QUEUED, *_LEAVES},
    RequestState.UNREAD: {RequestState.QUEUED, RequestState.BACKING_OFF, RequestState.ENDED},
    RequestState.UNCLAIMED: {
        RequestState.QUEUED,
        RequestState.RUNNING,
        RequestState.BACKING_OFF,
        RequestState.UNDELIVERED,
    },
    RequestState.UNDELIVERED: {RequestState.ENDED},
    RequestState.ENDED: {RequestState.CLOSED},
    RequestState.CLOSED: set[RequestState](),
}
