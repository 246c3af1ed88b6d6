"""Counts the turns that others get while a request waits, as an observer of the head sees them."""

from collections import Counter

from ..core.request import Request


class TurnsOfOthers:
    """Requests that wait, in order of arrival, and the dispatches of other clients since each became the
    first of its client's."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {}  # request id -> client
        self._num_turns: Counter[str] = Counter()  # by request id

    def submitted(self, request: Request) -> None:
        self._waiting[request.request_id] = request.client

    def dispatched(self, request_id: str) -> None:
        """Records a dispatch; those after a request's first are no turn."""
        client = self._waiting.pop(request_id, None)
        if client is None:
            return
        firsts: dict[str, str] = {}
        for waiting, of_client in self._waiting.items():
            firsts.setdefault(of_client, waiting)
        self._num_turns.update(first for of_client, first in firsts.items() if of_client != client)

    def ended(self, request_id: str) -> None:
        """Records the end of a request, which no longer waits."""
        self._waiting.pop(request_id, None)

    def of(self, request_id: str) -> int:
        return self._num_turns[request_id]
