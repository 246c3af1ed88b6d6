"""One loop for every shell: a state machine's commands are executed in the order in which they were decided,
even when executing one causes more."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

C = TypeVar("C")


class CommandPump(Generic[C]):
    """Carries out commands one after the other.

    Carrying one out may lead to another event of the same machine. That event is decided at once, as the
    machine has decided everything before it; its commands queue up behind those that were decided before.
    """

    def __init__(self, carry_out: Callable[[C], None], more: Callable[[], Iterable[C]] = tuple) -> None:
        """`more` is asked when no command is left, until it has none either."""
        self._carry_out = carry_out
        self._more = more
        self._waiting: deque[C] = deque()
        self._is_running = False

    def run(self, commands: Iterable[C]) -> bool:
        """Carry out `commands` and what follows from them. False when they wait for a caller that is at it
        already.

        An error of a command leaves those behind it for the next call.
        """
        self._waiting += commands
        if self._is_running:
            return False
        self._is_running = True
        try:
            while self._waiting or self._refill():
                self._carry_out(self._waiting.popleft())
        finally:
            self._is_running = False
        return True

    def _refill(self) -> bool:
        self._waiting += self._more()
        return bool(self._waiting)
