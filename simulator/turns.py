"""Counts the dispatches of others while a request waits, as an observer of the head sees them."""

from collections import Counter
from itertools import takewhile

from ..core.request import Request


class TurnsOfOthers:
    """Requests that wait, in order of arrival; for each, the dispatches of other clients since it became the
    first of its client's, and those of its client's younger requests."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}  # request id -> client
        self._num_turns: Counter[str] = Counter()  # by request id
        self._num_passed: Counter[str] = Counter()

    def submitted(self, request: Request) -> None:
        self._waiting[request.request_id] = request.client

    def dispatched(self, request_id: str) -> None:
        """Records a dispatch; those after a request's first are no turn."""
        client = self._waiting.get(request_id)
        if client is None:
            return
        older = takewhile(lambda waiting: waiting != request_id, self._waiting)
        self._num_passed.update(waiting for waiting in older if self._waiting[waiting] == client)
        del self._waiting[request_id]
        firsts: dict[str, str] = {}
        for waiting, of_client in self._waiting.items():
            firsts.setdefault(of_client, waiting)
        self._num_turns.update(first for of_client, first in firsts.items() if of_client != client)

    def ended(self, request_id: str) -> None:
        """Records the end of a request, which no longer waits."""
        self._waiting.pop(request_id, None)

    def num_passed(self, request_id: str) -> int:
        """Returns how many younger requests of its own client went before it."""
        return self._num_passed[request_id]

    def of(self, request_id: str) -> int:
        return self._num_turns[request_id]
