"""What a grammar process has been asked for, so that neither its death nor its work for one costs the others much. Pure.

It works off requests one after the other: when it dies, the oldest one that has no answer is the one it died of.
"""

import enum
from collections import deque
from dataclasses import dataclass

from ..core.codec import FrameError
from .messages import Advance, Close, FromProcess, Open, Refused, ToProcess

WINDOW = 8  # requests that the process has at once
MAX_DEATHS = 2  # of processes that were at work on an output, when nothing says at once that it was to blame


class Death(enum.Enum):
    """What a process died of."""

    TIME = enum.auto()  # of its job, which is to blame
    RESOURCES = enum.auto()  # of memory or stack; memory is everybody's, so who is there again the next time is to blame
    OTHER = enum.auto()  # nobody here is to blame


@dataclass(slots=True)
class _Output:
    """One output that follows a grammar, as far as it has come."""

    grammar: str
    token_ids: list[int]
    probe: bool
    is_open: bool = False  # the process of now knows it
    num_deaths: int = 0


class Outputs:
    """All outputs of one owner, across the processes that come and go. Keys are never used again.

    The process has few requests at a time, and one at most that opens an output, which may take long: a stream that needs its
    next mask waits for little of what others have asked.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}
        self._opening: dict[int, None] = {}  # keys that are to be asked for: those that the process does not know,
        self._advancing: dict[int, None] = {}  # and those that it knows; each in the order in which they came
        self._asked: deque[ToProcess] = deque()  # requests without an answer, oldest first

    @property
    def is_asked(self) -> bool:
        """Whether an answer is due."""
        return bool(self._asked or self._opening or self._advancing)

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...] = (), probe: bool = False) -> None:
        """A new output, whose next mask is wanted."""
        assert key not in self._outputs, f"{key} is open"
        self._outputs[key] = _Output(grammar, list(token_ids), probe)
        self._opening[key] = None

    def advance(self, key: int, token_id: int) -> None:
        """One more token of an output, whose last mask has come. Nothing, when the output was given up."""
        output = self._outputs.get(key)
        if output is not None:
            output.token_ids.append(token_id)
            (self._advancing if output.is_open else self._opening)[key] = None

    def close(self, key: int) -> Close | None:
        """Forget an output; what to tell the process, if it knows of it."""
        output = self._outputs.pop(key, None)
        self._opening.pop(key, None)
        self._advancing.pop(key, None)
        return Close(key) if output is not None and output.is_open else None

    def requests(self) -> list[ToProcess]:
        """What to ask the process now."""
        requests: list[ToProcess] = []
        if self._opening and not any(isinstance(request, Open) for request in self._asked):
            requests.append(self._open_request(_pop_first(self._opening)))
        while self._advancing and len(self._asked) + len(requests) < WINDOW:
            key = _pop_first(self._advancing)
            tokens = self._outputs[key].token_ids
            requests.append(Advance(key, len(tokens), tokens[-1]))
        self._asked.extend(requests)
        return requests

    def answered(self, answer: FromProcess) -> bool:
        """Whether somebody still wants to know. Raises FrameError for an answer to nothing."""
        if not self._asked or self._asked[0].key != answer.key:
            raise FrameError(f"an answer for {answer.key} came, {self._asked[0] if self._asked else 'none'} was due")
        self._asked.popleft()
        if isinstance(answer, Refused):
            return self._outputs.pop(answer.key, None) is not None
        return answer.key in self._outputs

    def died(self, death: Death) -> tuple[int, bool] | None:
        """The process is gone; the others are to be asked for again. Which key is given up, if any, and whether its grammar is
        to blame for it."""
        oldest = self._asked[0].key if self._asked else None
        for output in self._outputs.values():
            output.is_open = False
        due = [*(request.key for request in self._asked), *self._advancing]
        self._asked.clear()
        self._advancing.clear()
        self._opening = dict.fromkeys(key for key in due if key in self._outputs) | self._opening
        victim = None if oldest is None else self._outputs.get(oldest)
        if oldest is None or victim is None:
            return None
        victim.num_deaths += 1
        if death is not Death.TIME and victim.num_deaths < MAX_DEATHS:
            return None
        self.close(oldest)
        return oldest, death is not Death.OTHER

    def give_up(self) -> list[int]:
        """All keys whose answers are due, after a death, are forgotten."""
        keys = list(self._opening)
        for key in keys:
            self.close(key)
        return keys

    def _open_request(self, key: int) -> Open:
        output = self._outputs[key]
        output.is_open = True
        return Open(key, output.grammar, tuple(output.token_ids), output.probe)


def _pop_first(keys: dict[int, None]) -> int:
    key = next(iter(keys))
    del keys[key]
    return key
