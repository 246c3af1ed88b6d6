"""Open decode legs, in the orders in which they may have to make room for others.

    client   -> worker -> its legs there          whose place, and where
    priority -> client -> its legs, oldest first  what gives way to a higher priority
    client   -> those that have failed            places that are about to be free

The ledger keeps it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from .live_request import Dispatch, DispatchState
from .registered_worker import RegisteredWorker

A = TypeVar("A")
B = TypeVar("B")

Legs = dict[Dispatch, None]  # an ordered set


class DecodeLegs:
    """Each leg from its dispatch until its worker has ended it."""

    def __init__(self) -> None:
        self._by_client: dict[str, dict[RegisteredWorker, Legs]] = {}
        self._by_priority: dict[int, dict[str, Legs]] = {}
        self._failed: dict[str, Legs] = {}  # by client, none empty

    def add(self, dispatch: Dispatch) -> None:
        client = dispatch.spec.client
        assert dispatch.decode is not None
        self._by_client.setdefault(client, {}).setdefault(dispatch.decode, {})[dispatch] = None
        self._by_priority.setdefault(dispatch.priority, {}).setdefault(client, {})[dispatch] = None

    def fail(self, dispatch: Dispatch) -> None:
        """Records that an open leg's work is served elsewhere."""
        self._failed.setdefault(dispatch.spec.client, {})[dispatch] = None

    def remove(self, dispatch: Dispatch) -> None:
        client = dispatch.spec.client
        assert dispatch.decode is not None
        _remove(self._by_client, client, dispatch.decode, dispatch)
        _remove(self._by_priority, dispatch.priority, client, dispatch)
        if dispatch in self._failed.get(client, {}):
            del self._failed[client][dispatch]
            if not self._failed[client]:
                del self._failed[client]

    def of_client(self, client: str) -> Mapping[RegisteredWorker, Legs]:
        """Returns a client's legs by worker, the oldest there first."""
        return self._by_client.get(client, {})

    def failed_of(self, client: str) -> Iterable[Dispatch]:
        """Returns a client's legs whose work is served elsewhere."""
        return self._failed.get(client, ())

    def below(self, priority: int, clients: Callable[[], Iterable[str]]) -> Iterator[Dispatch]:
        """Yields the legs of lower priorities than `priority`: those that have failed first, then the lowest
        priority first, within one in the order of `clients`, the youngest of each first."""
        lower = sorted((number for number in self._by_priority if number > priority), reverse=True)
        if lower:
            yield from (leg for legs in self._failed.values() for leg in legs if leg.priority > priority)
        for number in lower:
            of_clients = self._by_priority[number]
            for client in clients():
                yield from reversed(of_clients.get(client, {}))

    def check_integrity(self, open_legs: set[Dispatch]) -> None:
        """Checks each index against the legs that are open."""
        by_client = {leg for workers in self._by_client.values() for legs in workers.values() for leg in legs}
        clients = (legs for of_clients in self._by_priority.values() for legs in of_clients.values())
        by_priority = {leg for legs in clients for leg in legs}
        failed = {leg for legs in self._failed.values() for leg in legs}
        assert by_client == by_priority == open_legs, f"{by_client ^ open_legs}, {by_priority ^ open_legs}"
        assert failed == {leg for leg in open_legs if leg.state is DispatchState.FAILED}, f"failed: {failed}"


def _remove(index: dict[A, dict[B, Legs]], outer: A, inner: B, dispatch: Dispatch) -> None:
    """Removes an entry, and what is empty without it."""
    legs = index[outer][inner]
    del legs[dispatch]
    if not legs:
        del index[outer][inner]
        if not index[outer]:
            del index[outer]
