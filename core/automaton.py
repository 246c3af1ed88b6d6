"""A state, the transitions that its table allows, and the history that led to it.

Transfers and KV links hold one (`kv_transfer/states.py`); requests, dispatches, workers, fleet members
and hosts derive from it (`router/`)."""

import enum
from collections.abc import Mapping, Set
from typing import Generic, TypeVar

from .errors import InvalidTransition

MAX_STORY = 16  # states that an error message lists

S = TypeVar("S", bound=enum.Enum)


class Automaton(Generic[S]):
    """One object's state. Any code may read `state`; only `transition` writes it."""

    __slots__ = ("_name", "_story", "_transitions", "state")

    def __init__(
        self, transitions: Mapping[S, Set[S]], initial: S, *, name: str = "", at_s: float | None = None
    ) -> None:
        self._name = name
        self._transitions = transitions
        self._story: list[tuple[S, float | None, str]] = [(initial, at_s, "")]
        self.state = initial

    def __str__(self) -> str:
        """The object's name in error messages."""
        return self._name

    def transition(self, target: S, at_s: float | None = None, why: str = "") -> None:
        """Enters `target`. Raises InvalidTransition, with the history so far, when the table lacks the
        transition."""
        if target not in self._transitions[self.state]:
            raise InvalidTransition(str(self), self.state, target, self.story())
        self.state = target
        self._story.append((target, at_s, why))
        if len(self._story) > MAX_STORY:
            del self._story[0]

    def story(self) -> list[str]:
        """The recent states, the present one last: when each was entered, and why, as far as is known."""
        return [_entry(*entry) for entry in self._story]


def _entry(state: enum.Enum, at_s: float | None, why: str) -> str:
    return str(state.value) + ("" if at_s is None else f" at {at_s:.3f} s") + (f" ({why})" if why else "")
