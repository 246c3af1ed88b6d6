"""The states of a request, and which follow which (`docs/architecture.md` draws them). What happens in each
is in `request_life.py`.

QUEUED, RUNNING and BACKING_OFF say where the work is that its client waits for. Its choices may be in several
places at once: RUNNING counts before QUEUED, and QUEUED before BACKING_OFF."""

import enum


class RequestState(enum.Enum):
    """Who has the request."""

    QUEUED = "queued"  # the queue: some of its work may be dispatched, and workers have none
    RUNNING = "running"  # workers have some of its work
    BACKING_OFF = "backing off"  # the queue: what is left of it has failed, and is due in a moment
    UNREAD = "unread"  # nobody: its client does not read, and its work is set aside
    UNCLAIMED = "unclaimed"  # workers, maybe: an earlier router had it, and its client has not come back yet
    UNDELIVERED = "undelivered"  # it has ended unclaimed, and its whole stream is kept for its client
    ENDED = "ended"  # its client has its ending; workers may still hold something for it
    CLOSED = "closed"  # nobody

    @property
    def is_over(self) -> bool:
        """No token comes any more."""
        return self is RequestState.ENDED or self is RequestState.CLOSED or self is RequestState.UNDELIVERED

    @property
    def has_client(self) -> bool:
        """Its stream goes to a client, and is not kept for one."""
        return self is not RequestState.UNCLAIMED and self is not RequestState.UNDELIVERED

    @property
    def is_served(self) -> bool:
        """Its work is in the queue or at workers: the state follows from where it is."""
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
