"""The core of the grammar process: a matcher for each constrained output. Requests in, answers out."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from .messages import Advance, Close, FromProcess, GrammarRefused, Mask, OpenOutput, ToProcess

MAX_CACHED_GRAMMARS = 32
MAX_REASON_CHARS = 200  # limit per line: the error of an invalid expression quotes it
FREE_S = 0.5  # processor time that every output has
S_PER_TOKEN = 0.001  # and that each of its tokens adds


@dataclass(slots=True)
class _MatchedOutput:
    """One output's matcher, and what computing on it has taken."""

    matcher: LLMatcher
    num_tokens: int
    used_s: float = 0.0


class Matchers:
    """The matchers of all outputs. Not thread-safe. A job may never end: the caller has to bound it."""

    def __init__(self, tokenizer: LLTokenizer, clock: Callable[[], float] = time.process_time) -> None:
        """`clock` returns the CPU time used."""
        self._tokenizer = tokenizer
        self._clock = clock
        self._outputs: dict[int, _MatchedOutput] = {}
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # least recently used first

    def handle(self, message: ToProcess) -> FromProcess | None:
        """The answer to a request, if it has one. What the grammar is to blame for comes as Refused."""
        started_s = self._clock()
        match message:
            case OpenOutput():
                output = self._open(message)
            case Advance():
                output = self._advance(message)
            case Close():
                self._outputs.pop(message.key, None)
                return None
        answer = self._answer(message.key, output)
        output.used_s += self._clock() - started_s
        is_probe = isinstance(message, OpenOutput) and message.probe
        free_s = FREE_S + S_PER_TOKEN * output.num_tokens
        if isinstance(answer, Mask) and output.used_s > (
            free_s / 2 if is_probe else free_s
        ):  # admitted outputs have room
            answer = GrammarRefused(message.key, "it takes too long to follow")
        if isinstance(answer, GrammarRefused) or is_probe:
            del self._outputs[message.key]
        return answer

    def forget_compiled(self) -> None:
        """Give back what is kept for grammars that may come again."""
        self._compiled.clear()

    def _open(self, message: OpenOutput) -> _MatchedOutput:
        matcher = self._compile(message.grammar).deep_copy()
        matcher.consume_tokens(list(message.token_ids))
        if message.probe and not matcher.is_error():
            token_id = _first_token(matcher.compute_bitmask())
            if token_id is not None:
                matcher.consume_token(token_id)
        output = self._outputs[message.key] = _MatchedOutput(matcher, len(message.token_ids))
        return output

    def _advance(self, message: Advance) -> _MatchedOutput:
        output = self._outputs[message.key]
        assert output.num_tokens == message.num_tokens - 1, (
            f"token {message.num_tokens - 1}, {output.num_tokens} was due"
        )
        output.matcher.consume_token(message.token_id)
        output.num_tokens += 1
        return output

    def _answer(self, key: int, output: _MatchedOutput) -> FromProcess:
        bits = b"" if output.matcher.is_error() else output.matcher.compute_bitmask()
        if output.matcher.is_error():
            return GrammarRefused(key, _reason(output.matcher.get_error()))
        return Mask(key, output.num_tokens, bits)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compiled[grammar] = LLMatcher(self._tokenizer, grammar, log_level=0)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher


def _first_token(bits: bytes) -> int | None:
    index = next((index for index, byte in enumerate(bits) if byte), None)
    return None if index is None else 8 * index + (bits[index] & -bits[index]).bit_length() - 1


def _reason(error: str) -> str:
    """Returns the reason in one line: the first line, and the one that explains the error where the first
    shows a position."""
    first, *others = error.strip().splitlines() or [""]
    if first in ("NoExtension", "NoExtensionBias"):
        return "no text fits it"
    cause = next((line.strip() for line in others if line.strip().startswith("error:")), "")
    return f"{first[:MAX_REASON_CHARS]} {cause[:MAX_REASON_CHARS]}".strip()
