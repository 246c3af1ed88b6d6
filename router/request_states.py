"""The states of a request and their transitions (drawn in `docs/architecture.md`). Reactions in each state
are in `request_life.py`.

QUEUED, RUNNING and BACKING_OFF state where the work is that its client waits for. Its choices may be in
several places at once: RUNNING takes precedence over QUEUED, and QUEUED over BACKING_OFF."""

import enum


class RequestState(enum.Enum):
    """The holder of the request."""

    QUEUED = "queued"  # the queue: some of its work may be dispatched, and workers have none
    RUNNING = "running"  # workers have some of its work
    BACKING_OFF = "backing off"  # the queue: its remaining work has failed, and is due soon
    UNREAD = "unread"  # nobody: its client does not read, and its work is set aside
    UNCLAIMED = "unclaimed"  # workers, maybe: an earlier router had it, and its client has not come back yet
    UNDELIVERED = "undelivered"  # it has ended unclaimed, and its whole stream is kept for its client
    ENDED = "ended"  # its client has its ending; workers may still hold something for it
    CLOSED = "closed"  # nobody

    @property
    def is_over(self) -> bool:
        """Whether no more tokens will come."""
        return self is RequestState.ENDED or self is RequestState.CLOSED or self is RequestState.UNDELIVERED

    @property
    def has_client(self) -> bool:
        """Whether the stream goes to a client, and is not kept for one."""
        return self is not RequestState.UNCLAIMED and self is not RequestState.UNDELIVERED

    @property
    def is_served(self) -> bool:
        """Whether the work is in the queue or at workers: the state follows from its location."""
        return self is RequestState.QUEUED or self is RequestState.RUNNING or self is RequestState.BACKING_OFF


_LEAVES = {RequestState.UNREAD, RequestState.ENDED}
TRANSITIONS = {
    RequestState.QUEUED: {RequestState.RUNNING, RequestState.BACKING_OFF, *_LEAVES},
    RequestState.RUNNING: {RequestState.QUEUED, RequestState.BACKING_OFF, *_LEAVES},
    RequestState.BACKING_OFF: {RequestState.QUEUED, *_LEAVES},
    RequestState.UNREAD: {RequestState.QUEUED, RequestState.ENDED},
    RequestState.UNCLAIMED: {RequestState.QUEUED, RequestState.RUNNING, RequestState.UNDELIVERED},
    RequestState.UNDELIVERED: {RequestState.ENDED},
    RequestState.ENDED: {RequestState.CLOSED},
    RequestState.CLOSED: set[RequestState](),
}
