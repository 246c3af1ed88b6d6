"""The requests to a grammar process, managed so that neither its death nor its work for one request costs the
others much. Pure.

It handles requests one at a time: when it dies, the oldest unanswered one is the cause. This module chooses
the next requests: clients take turns."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..core.codec import FrameError
from ..core.limited_child import Death
from .messages import Advance, Close, FromProcess, GrammarRefused, OpenOutput, ToProcess

WINDOW = 8  # requests that the process has at once
WINDOW_EACH = 4  # per client
MAX_DEATHS = 2  # deaths of processes at work on an output, when none shows at once that it was to blame


@dataclass(slots=True)
class _Output:
    """One output that follows a grammar, with its tokens so far."""

    client: str
    grammar: str
    token_ids: list[int]
    probe: bool
    is_open: bool = False  # the process of now knows it
    num_deaths: int = 0


class _Turns:
    """Keys that wait, of many clients: one of each in turn, those of one client in the order in which they
    came."""

    def __init__(self) -> None:
        # the client whose turn it is comes first; none is empty
        self._lanes: OrderedDict[str, dict[int, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[int]:
        return (key for lane in self._lanes.values() for key in lane)

    def __contains__(self, of_client: tuple[str, int]) -> bool:
        client, key = of_client
        return key in self._lanes.get(client, ())

    def push(self, client: str, key: int) -> None:
        self._lanes.setdefault(client, {})[key] = None

    def clear(self) -> None:
        self._lanes.clear()

    def remove(self, client: str, key: int) -> None:
        """Nothing happens when it is not there."""
        lane = self._lanes.get(client, {})
        lane.pop(key, None)
        if not lane:
            self._lanes.pop(client, None)

    def pop(self, num_asked: Counter[str], limit: int) -> int | None:
        """The next key of a client that was asked for less than `limit` times; None when there is none."""
        client = next((client for client in self._lanes if num_asked[client] < limit), None)
        if client is None:
            return None
        key = next(iter(self._lanes[client]))
        self._lanes.move_to_end(client)
        self.remove(client, key)
        return key


@dataclass(frozen=True, slots=True)
class _PendingMask:
    """A request without an answer. It counts for the output's client, also when that is closed, or handed
    over and back."""

    request: OpenOutput | Advance
    output: _Output


class Outputs:
    """All outputs of one process and its successors. Keys are never reused.

    The process has few requests at a time, and one at most that opens an output, which may take long: a
    stream that needs its next mask waits for little of what others have asked, and for less of what one
    client has."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}
        self._opening = _Turns()  # keys that are to be asked for: those that the process does not know,
        self._advancing = _Turns()  # and those that it knows
        self._asked: deque[_PendingMask] = deque()  # oldest first
        self._num_asked: Counter[str] = Counter()  # asked requests by client

    @property
    def is_asked(self) -> bool:
        """Whether an answer is due."""
        return bool(self._asked or self._opening or self._advancing)

    @property
    def oldest_client(self) -> str | None:
        """The client of the oldest request without an answer: the one that the process works on."""
        return self._asked[0].output.client if self._asked else None

    def open(
        self,
        key: int,
        grammar: str,
        token_ids: tuple[int, ...] = (),
        *,
        probe: bool = False,
        client: str = "",
    ) -> None:
        """A new output, whose next mask is wanted."""
        assert key not in self._outputs, f"{key} is open"
        self._outputs[key] = _Output(client, grammar, list(token_ids), probe)
        self._opening.push(client, key)

    def advance(self, key: int, token_id: int) -> None:
        """Adds a token to an output whose last mask has arrived. No-op when the output was abandoned."""
        output = self._outputs.get(key)
        if output is not None:
            output.token_ids.append(token_id)
            (self._advancing if output.is_open else self._opening).push(output.client, key)

    def close(self, key: int) -> Close | None:
        """Forgets an output; returns the message for the process, if it holds the output."""
        output = self._outputs.pop(key, None)
        if output is None:
            return None
        self._opening.remove(output.client, key)
        self._advancing.remove(output.client, key)
        return Close(key) if output.is_open else None

    def hand_over(self, client: str, other: "Outputs") -> tuple[list[int], list[Close]]:
        """Moves all outputs of a client to those of another process. Returns their keys, and the messages for
        this one's process."""
        asked = set(self._keys_asked())
        keys, messages = [key for key, output in self._outputs.items() if output.client == client], []
        for key in keys:
            output = self._outputs[key]
            is_due = key in asked or (client, key) in self._opening or (client, key) in self._advancing
            if (message := self.close(key)) is not None:
                messages.append(message)
            other._outputs[key] = replace(output, is_open=False)
            if is_due:
                other._opening.push(client, key)
        return keys, messages

    def requests(self) -> list[ToProcess]:
        """Returns the requests to send to the process now."""
        requests: list[ToProcess] = []
        if not any(isinstance(entry.request, OpenOutput) for entry in self._asked):
            key = self._opening.pop(self._num_asked, WINDOW_EACH)
            if key is not None:
                requests.append(self._ask(key, self._open_request(key)))
        while len(self._asked) < WINDOW:
            key = self._advancing.pop(self._num_asked, WINDOW_EACH)
            if key is None:
                break
            tokens = self._outputs[key].token_ids
            requests.append(self._ask(key, Advance(key, len(tokens), tokens[-1])))
        return requests

    def _ask(self, key: int, request: OpenOutput | Advance) -> ToProcess:
        output = self._outputs[key]
        self._asked.append(_PendingMask(request, output))
        self._num_asked[output.client] += 1
        return request

    def _keys_asked(self) -> Iterator[int]:
        """Keys of outputs whose answers are due and still wanted, oldest first."""
        for entry in self._asked:
            if self._outputs.get(entry.request.key) is entry.output:
                yield entry.request.key

    def answered(self, answer: FromProcess) -> bool:
        """Whether the answer is still wanted. Raises FrameError for an answer without a request."""
        if not self._asked or self._asked[0].request.key != answer.key:
            raise FrameError(
                f"an answer for {answer.key} came, {self._asked[0] if self._asked else 'none'} was due"
            )
        output = self._asked.popleft().output
        self._num_asked[output.client] -= 1
        if not self._num_asked[output.client]:
            del self._num_asked[output.client]
        is_wanted = self._outputs.get(answer.key) is output
        if is_wanted and isinstance(answer, GrammarRefused):
            del self._outputs[answer.key]
        return is_wanted

    def died(self, death: Death) -> tuple[int, bool] | None:
        """The process is gone; the others are to be asked for again. Which key is given up, if any, and
        whether its grammar is to blame for it."""
        oldest = self._asked[0] if self._asked else None
        for output in self._outputs.values():
            output.is_open = False
        due = [*self._keys_asked(), *self._advancing]
        waiting = list(self._opening)
        self._asked.clear()
        self._num_asked.clear()
        self._advancing.clear()
        self._opening.clear()
        self._wait((*due, *waiting))
        if oldest is None or self._outputs.get(oldest.request.key) is not oldest.output:
            return None
        victim = oldest.output
        victim.num_deaths += 1
        if death is not Death.TIME and victim.num_deaths < MAX_DEATHS:
            return None
        self.close(oldest.request.key)
        return oldest.request.key, death is not Death.OTHER

    def _wait(self, keys: Iterable[int]) -> None:
        for key in keys:
            if (output := self._outputs.get(key)) is not None:
                self._opening.push(output.client, key)

    def give_up(self) -> list[int]:
        """Forgets all keys whose answers are due, after a death."""
        keys = list(self._opening)
        for key in keys:
            self.close(key)
        return keys

    def _open_request(self, key: int) -> OpenOutput:
        output = self._outputs[key]
        output.is_open = True
        return OpenOutput(key, output.grammar, tuple(output.token_ids), output.probe)
