"""Turns the router's events into the messages of one stream: text, stop strings, finish reasons and the
timeline.

Pure: one `ResponseEvents` per request, events in, messages out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from ..core.messages import TokenLogprobs, TokenOutput
from ..core.request import FinishReason, Request
from ..proto import pdserve_pb2 as pb
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens, Timeline
from .frontend import StreamEvent
from .intake import shown_id
from .text.detokenizer import Detokenizer
from .text.stop_strings import Pattern, StopMatcher
from .text.tokenizer import Tokenizer
from .timeline import num_cached_tokens, timeline_message
from .tools.reader import CallReader
from .translate import RequestFailed

MAX_LOGPROBS_PER_MESSAGE = 1 << 10  # 15 bytes each; a message is made in one turn of the loop
BYTES_OF_A_BYTE = 4  # in memory, of a message's byte on the wire: most are small numbers
FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class ResponseEvents:
    """The messages of one request. Calls `stop_choice` for a choice whose stop string was found."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        stop_choice: Callable[[int], None],
        resume_from: Sequence[int] = (),
    ) -> None:
        """`resume_from` holds, for each choice, the first token index that the client wants; by default 0."""
        self._request = request
        self._stop_choice = stop_choice
        patterns = [Pattern.compile(text) for text in request.sampling.stop]
        first = resume_from or [0] * request.sampling.n
        self._choices = [
            _Choice(
                request,
                tokenizer,
                patterns,
                index,
                CallReader(request, tokenizer, choice) if request.has_tools else None,
            )
            for choice, index in enumerate(first)
        ]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self._choices)

    def handle(self, event: StreamEvent) -> Iterator[pb.GenerateEvent]:
        """Yields the messages that result from an event. Raises RequestFailed if the request ended before its
        choices did."""
        match event:
            case EmitTokens(choice=choice, tokens=tokens):
                yield from self._tokens(choice, tokens)
            case EmitChoiceEnd(choice=choice, finish_reason=reason):
                if reason in FINISH_REASONS and not self._choices[choice].ended:
                    yield from self._end_choice(choice, reason)
            case EmitEnd(finish_reason=None, timeline=timeline):
                yield pb.GenerateEvent(end=self._end(timeline))
            case EmitEnd(finish_reason=reason, error=error):
                assert reason is not None
                raise RequestFailed(reason, error)

    def _tokens(self, index: int, tokens: tuple[TokenOutput, ...]) -> Iterator[pb.GenerateEvent]:
        choice = self._choices[index]
        if choice.ended:
            return
        if tokens[0].index >= choice.first_index:
            yield from self._prompt(tokens[0].prompt_logprobs)
        if self._request.only_scores:
            yield pb.GenerateEvent(tokens=pb.TokenDelta(choice=index))
            return
        delta = pb.TokenDelta(choice=index, index=max(tokens[0].index, choice.first_index))
        for token in tokens:
            if token.index < choice.first_index:
                choice.push(token, pb.TokenDelta())
            else:
                choice.push(token, delta)
                delta.token_ids.append(token.token_id)
                if token.logprob is not None:
                    delta.logprobs.append(_logprobs(token.logprob, token.top_logprobs))
            if choice.stops.found is not None:
                break
        if delta.token_ids:
            yield pb.GenerateEvent(tokens=delta)
        if choice.stops.found is not None:
            self._stop_choice(index)
            yield from self._end_choice(index, FinishReason.STOP)

    def _prompt(self, logprobs: tuple[TokenLogprobs, ...]) -> Iterator[pb.GenerateEvent]:
        """Yields the prompt's log probabilities in messages small enough for every client."""
        count = max(1, MAX_LOGPROBS_PER_MESSAGE // (1 + (self._request.sampling.prompt_logprobs or 0)))
        for start in range(0, len(logprobs), count):
            part = logprobs[start : start + count]
            delta = pb.PromptDelta(
                index=1 + start, token_ids=self._request.prompt_token_ids[1 + start : 1 + start + len(part)]
            )
            delta.logprobs.extend(_logprobs(token.logprob, token.top) for token in part)
            yield pb.GenerateEvent(prompt=delta)

    def _end_choice(self, index: int, reason: FinishReason) -> Iterator[pb.GenerateEvent]:
        choice = self._choices[index]
        rest = pb.TokenDelta(choice=index, index=choice.num_tokens)
        choice.flush(rest)
        if rest.text or rest.tool_calls:
            yield pb.GenerateEvent(tokens=rest)
        choice.ended = True
        found = choice.stops.found
        finish_reason = FINISH_REASONS[reason if found is None else FinishReason.STOP]
        if self._request.only_scores:
            finish_reason = pb.FINISH_REASON_LENGTH
        elif reason is FinishReason.STOP and found is None and choice.has_called:
            finish_reason = pb.FINISH_REASON_TOOL_CALLS
        yield pb.GenerateEvent(
            choice_end=pb.ChoiceEnd(choice=index, finish_reason=finish_reason, stop_string=found)
        )

    def _end(self, timeline: Timeline) -> pb.RequestEnd:
        usage = pb.Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            cached_tokens=num_cached_tokens(timeline),
            completion_tokens=self.num_tokens,
        )
        return pb.RequestEnd(
            request_id=shown_id(self._request), usage=usage, timeline=timeline_message(timeline)
        )


class _Choice:
    """The text and tool calls of one choice so far."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        patterns: list[Pattern],
        first_index: int,
        calls: CallReader | None,
    ) -> None:
        self.first_index = first_index  # the first index that the client wants
        self._min_tokens = request.sampling.min_tokens
        self._calls = calls
        self._detokenizer = Detokenizer(
            tokenizer if calls is None else calls.decoder, request.prompt_token_ids
        )
        self.stops = StopMatcher(patterns)
        self.num_tokens = 0
        self.ended = False

    @property
    def has_called(self) -> bool:
        return self._calls is not None and self._calls.has_called

    def push(self, token: TokenOutput, delta: pb.TokenDelta) -> None:
        """Adds what may be sent with this token. A token that ends the choice by its id has no text."""
        self.num_tokens += 1
        if token.finish_reason is FinishReason.STOP:
            return
        text = self._detokenizer.push(token.token_id)
        if self._calls is not None:
            text = self._calls.push(text, delta)
        delta.text += text if token.index < self._min_tokens else self.stops.push(text)
        if delta.tool_calls:
            self._end_text(delta)

    def flush(self, delta: pb.TokenDelta) -> None:
        """Adds the remaining text, which may still complete a stop string."""
        if self.stops.found is not None:
            return
        text = self._detokenizer.flush()
        if self._calls is not None:
            text = self._calls.push(text, delta) + self._calls.flush(delta)
        delta.text += self.stops.push(text)
        self._end_text(delta)

    def _end_text(self, delta: pb.TokenDelta) -> None:
        """Completes the text, as only calls follow it; drops the calls if a stop string ended the choice
        before them."""
        if self.stops.found is None:
            delta.text += self.stops.flush()
        else:
            del delta.tool_calls[:]


def _logprobs(logprob: float, top: tuple[tuple[int, float], ...]) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=logprob, top=[pb.TokenLogprob(token_id=t, logprob=value) for t, value in top]
    )


def kept_bytes(event: pb.GenerateEvent) -> int:
    """Returns about how much memory an event takes that is kept until its answer is complete."""
    return BYTES_OF_A_BYTE * event.ByteSize()


class Collector:
    """Assembles a stream's messages into the response of the unary call."""

    def __init__(self) -> None:
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._arguments: defaultdict[tuple[int, int], list[str]] = defaultdict(list)  # by (choice, call)
        self._choices: defaultdict[int, pb.Choice] = defaultdict(pb.Choice)
        self._prompt: pb.PromptDelta | None = None
        self._end = pb.RequestEnd()

    def add(self, event: pb.GenerateEvent) -> None:
        match event.WhichOneof("event"):
            case "tokens":
                delta = event.tokens
                choice = self._choices[delta.choice]
                self._texts[delta.choice].append(delta.text)
                choice.token_ids.extend(delta.token_ids)
                choice.logprobs.extend(delta.logprobs)
                self._add_calls(choice, delta)
            case "prompt":
                if self._prompt is None:
                    self._prompt = pb.PromptDelta(index=event.prompt.index)
                self._prompt.token_ids.extend(event.prompt.token_ids)
                self._prompt.logprobs.extend(event.prompt.logprobs)
            case "choice_end":
                end, choice = event.choice_end, self._choices[event.choice_end.choice]
                choice.text = "".join(self._texts[end.choice])
                choice.finish_reason = end.finish_reason
                for index, call in enumerate(choice.tool_calls):
                    call.arguments = "".join(self._arguments[end.choice, index])
                if end.HasField("stop_string"):
                    choice.stop_string = end.stop_string
            case "end":
                self._end = event.end

    def _add_calls(self, choice: pb.Choice, delta: pb.TokenDelta) -> None:
        for part in delta.tool_calls:
            if part.id:
                choice.tool_calls.add(id=part.id, name=part.name)
            self._arguments[delta.choice, part.index].append(part.arguments)

    def response(self) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            request_id=self._end.request_id,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._end.usage,
            timeline=self._end.timeline,
            prompt=self._prompt,
        )
