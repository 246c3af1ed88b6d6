"""What a grammar process has been asked for, so that its death costs nobody else anything. Pure.

It works off requests one after the other: when it dies, the oldest one that has no answer is the one it died of.
"""

from collections import deque
from dataclasses import dataclass

from .messages import Advance, Close, FromProcess, Open, Refused, ToProcess

MAX_DEATHS = 2  # of processes that were at work on an output, when nothing says that it was to blame


@dataclass(slots=True)
class _Output:
    """One output that follows a grammar, as far as it has come."""

    grammar: str
    token_ids: list[int]
    probe: bool
    is_open: bool = False  # the process of now knows it
    num_deaths: int = 0


class Outputs:
    """All outputs of one owner, across the processes that come and go. Keys are never used again."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}
        self._asked: deque[int] = deque()  # keys whose answers are due, in the order of the requests

    @property
    def is_asked(self) -> bool:
        """Whether an answer is due."""
        return bool(self._asked)

    def open(self, key: int, grammar: str, token_ids: tuple[int, ...], probe: bool) -> ToProcess:
        """The request for a new output."""
        assert key not in self._outputs, f"{key} is open"
        output = self._outputs[key] = _Output(grammar, list(token_ids), probe)
        return self._ask(key, output)

    def advance(self, key: int, token_id: int) -> ToProcess | None:
        """The request for one more token; None when the output was refused."""
        output = self._outputs.get(key)
        if output is None:
            return None
        output.token_ids.append(token_id)
        if not output.is_open:
            return self._ask(key, output)
        self._asked.append(key)
        return Advance(key, len(output.token_ids), token_id)

    def close(self, key: int) -> ToProcess | None:
        """The request to forget; None when there is nothing to forget."""
        output = self._outputs.pop(key, None)
        return Close(key) if output is not None and output.is_open else None

    def answered(self, answer: FromProcess) -> bool:
        """Whether somebody still wants to know."""
        key = self._asked.popleft()
        assert key == answer.key, f"answer for {answer.key}, {key} was due"
        if isinstance(answer, Refused):
            return self._outputs.pop(key, None) is not None
        return key in self._outputs

    def died(self, of_its_job: bool) -> tuple[int, bool] | None:
        """The process is gone. The key that has to be given up, if any, and whether its grammar is to blame for it."""
        victim = self._outputs.get(self._asked[0]) if self._asked else None
        for output in self._outputs.values():
            output.is_open = False
        if victim is None:
            return None
        victim.num_deaths += 1
        if not of_its_job and victim.num_deaths < MAX_DEATHS:
            return None
        del self._outputs[self._asked[0]]
        return self._asked[0], of_its_job

    def restarted(self) -> list[ToProcess]:
        """What to ask a new process for, in the order it was asked before."""
        due = [key for key in self._asked if key in self._outputs]
        self._asked.clear()
        return [self._ask(key, self._outputs[key]) for key in due]

    def _ask(self, key: int, output: _Output) -> ToProcess:
        output.is_open = True
        self._asked.append(key)
        return Open(key, output.grammar, tuple(output.token_ids), output.probe)
