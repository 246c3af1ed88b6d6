"""Formats the messages of the gRPC API as JSON: the chunks of a stream, and whole responses.

A chunk is assembled from ready pieces of JSON: this is done for every token of every stream, so nothing is
built here that is not sent."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Raw
from msgspec.json import encode

from ...core.request import Request
from ...proto import pdserve_pb2 as pb
from ..text.tokenizer import Tokenizer
from .logprobs import chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"
REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The details that a client asked for."""

    token_ids: bool = False
    logprobs: bool = False
    usage: bool = False  # before the end of a stream
    running_usage: bool = False  # in each chunk
    echoes: tuple[str, ...] = ()  # the text of each prompt, with which its choices begin


class Format(ABC):
    """The answer to one HTTP request, which may have several prompts. Choices are numbered across prompts."""

    kind = ""  # of a whole answer
    chunk_kind = ""

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        wanted: Wanted,
    ) -> None:
        self._answer = {"id": answer_id, "object": self.kind, "created": created, "model": model}
        self._requests = requests
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._head = b"data: " + encode(self._answer | {"object": self.chunk_kind})[:-1] + b',"choices":['
        self._n = requests[0].sampling.n
        self._choices = [_Progress() for _ in range(self._n * len(requests))]
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._num_tokens = 0
        self._num_cached_tokens = 0

    # streams

    def chunk(self, prompt: int, event: pb.GenerateEvent) -> bytes:
        """Returns the output for a message of one of the prompts."""
        match event.WhichOneof("event"):
            case "tokens":
                return self._delta(prompt, event.tokens)
            case "choice_end":
                end = event.choice_end
                number = prompt * self._n + end.choice
                return self._end_chunk(number, REASONS[end.finish_reason], self._stop_reason(number, end))
            case "prompt":
                self._choices[prompt * self._n].prompt.MergeFrom(event.prompt)
                return b""
            case _:
                self._num_cached_tokens += event.end.usage.cached_tokens
                return b""

    def last(self) -> bytes:
        """Returns the final output."""
        if not self._wanted.usage:
            return DONE
        return b'%s],"usage":%s}\n\n%s' % (self._head, encode(self._usage(whole=True)), DONE)

    def _delta(self, prompt: int, delta: pb.TokenDelta) -> bytes:
        number = prompt * self._n + delta.choice
        progress, token_ids = self._choices[number], delta.token_ids
        if token_ids:
            self._num_tokens += len(token_ids)
            progress.last_token_id = token_ids[-1]
        extra = b',"token_ids":' + encode(list(token_ids)) if self._wanted.token_ids else b""
        logprobs = (
            encode(self._logprobs(number, token_ids, delta.logprobs)) if self._wanted.logprobs else b"null"
        )
        if progress.has_begun:
            return self._text_chunk(number, delta, logprobs, extra)
        progress.has_begun = True
        return self._first_chunk(number, prompt, delta, logprobs, extra)

    def _tail(self) -> bytes:
        """Returns the end of a chunk, after its choice."""
        if self._wanted.running_usage:
            return b'}],"usage":%s}\n\n' % encode(self._usage(whole=False))
        return b'}],"usage":null}\n\n' if self._wanted.usage else b"}]}\n\n"

    @abstractmethod
    def _end_chunk(self, number: int, reason: str, stop_reason: str | int | None) -> bytes: ...

    @abstractmethod
    def _text_chunk(self, number: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes) -> bytes: ...

    @abstractmethod
    def _first_chunk(
        self, number: int, prompt: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes
    ) -> bytes: ...

    # whole answers

    def whole(self, responses: Sequence[pb.GenerateResponse]) -> bytes:
        """Returns the answer, given the response to each prompt. Encoding holds the GIL, so each choice is
        encoded by itself."""
        choices: list[Raw] = []
        for prompt, response in enumerate(responses):
            self._num_cached_tokens += response.usage.cached_tokens
            self._num_tokens += response.usage.completion_tokens
            self._choices[prompt * self._n].prompt = response.prompt
            formatted = (self._choice(prompt, *numbered) for numbered in enumerate(response.choices))
            choices += map(Raw, map(encode, formatted))
        return encode(
            self._answer | {"choices": choices, "usage": self._usage(whole=True)} | self._whole_extra()
        )

    def _choice(self, prompt: int, index: int, choice: pb.Choice) -> dict[str, Any]:
        number = prompt * self._n + index
        progress = self._choices[number]
        if choice.token_ids:
            progress.last_token_id = choice.token_ids[-1]
        formatted: dict[str, Any] = {
            "index": number,
            "logprobs": (
                self._logprobs(number, choice.token_ids, choice.logprobs) if self._wanted.logprobs else None
            ),
            "finish_reason": REASONS[choice.finish_reason],
            "stop_reason": self._stop_reason(number, choice),
        }
        if self._wanted.token_ids:
            formatted["token_ids"] = list(choice.token_ids)
        return formatted

    def _whole_extra(self) -> dict[str, Any]:
        return {}

    # both

    @abstractmethod
    def _logprobs(
        self, number: int, ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]
    ) -> dict[str, Any]: ...

    def _stop_reason(self, number: int, end: pb.ChoiceEnd | pb.Choice) -> str | int | None:
        """Returns the stop string or stop token that ended a choice, as in vLLM; None if something else
        did."""
        if end.HasField("stop_string"):
            return end.stop_string
        last = self._choices[number].last_token_id
        is_stop = (
            end.finish_reason == pb.FINISH_REASON_STOP and last in self._requests[0].sampling.stop_token_ids
        )
        return last if is_stop else None

    def _usage(self, whole: bool) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_tokens,
        }
        return (
            usage | {"prompt_tokens_details": {"cached_tokens": self._num_cached_tokens}} if whole else usage
        )


class CompletionFormat(Format):
    """`/v1/completions`."""

    kind = chunk_kind = "text_completion"

    def _text_chunk(self, number: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes) -> bytes:
        return b'%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":null%s%s' % (
            self._head, number, encode(delta.text), logprobs, extra, self._tail()
        )  # fmt: skip

    def _first_chunk(
        self, number: int, prompt: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes
    ) -> bytes:
        if self._wanted.token_ids:
            extra += b',"prompt_token_ids":' + encode(self._requests[prompt].prompt_token_ids)
        return self._text_chunk(number, pb.TokenDelta(text=self._echo(prompt) + delta.text), logprobs, extra)

    def _end_chunk(self, number: int, reason: str, stop_reason: str | int | None) -> bytes:
        extra = b',"token_ids":[]' if self._wanted.token_ids else b""
        return b'%s{"index":%d,"text":"","logprobs":null,"finish_reason":"%s","stop_reason":%s%s%s' % (
            self._head, number, reason.encode(), encode(stop_reason), extra, self._tail()
        )  # fmt: skip

    def _choice(self, prompt: int, index: int, choice: pb.Choice) -> dict[str, Any]:
        formatted = super()._choice(prompt, index, choice) | {"text": self._echo(prompt) + choice.text}
        if self._wanted.token_ids:
            formatted["prompt_token_ids"] = self._requests[prompt].prompt_token_ids
        return formatted

    def _echo(self, prompt: int) -> str:
        return self._wanted.echoes[prompt] if self._wanted.echoes else ""

    def _logprobs(
        self, number: int, ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]
    ) -> dict[str, Any]:
        """Includes those of the prompt before the first token, if the prompt is echoed."""
        progress = self._choices[number]
        before = None
        if self._wanted.echoes and not progress.has_logprobs:
            request = self._requests[number // self._n]
            before = (request.prompt_token_ids, self._choices[number - number % self._n].prompt.logprobs)
        progress.has_logprobs = True
        formatted, progress.offset = completion_logprobs(
            self._tokenizer, ids, logprobs, progress.offset, before
        )
        return formatted


class ChatFormat(Format):
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _text_chunk(self, number: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes) -> bytes:
        said = encode(_said(delta)) if delta.tool_calls else b'{"content":%s}' % encode(delta.text)
        return b'%s{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null%s%s' % (
            self._head, number, said, logprobs, extra, self._tail()
        )  # fmt: skip

    def _first_chunk(
        self, number: int, prompt: int, delta: pb.TokenDelta, logprobs: bytes, extra: bytes
    ) -> bytes:
        """Sends the role first, by itself."""
        tail = self._tail()
        if self._wanted.token_ids:
            tail = b'}],"prompt_token_ids":' + encode(self._requests[0].prompt_token_ids) + tail[2:]
        role = (
            b'%s{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null%s'
            % (self._head, number, tail)
        )
        return role + self._text_chunk(number, delta, logprobs, extra)

    def _end_chunk(self, number: int, reason: str, stop_reason: str | int | None) -> bytes:
        extra = b',"token_ids":[]' if self._wanted.token_ids else b""
        return b'%s{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s","stop_reason":%s%s%s' % (
            self._head, number, reason.encode(), encode(stop_reason), extra, self._tail()
        )  # fmt: skip

    def _choice(self, prompt: int, index: int, choice: pb.Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            calls = [_call(call.id, call.name, call.arguments) for call in choice.tool_calls]
            message |= {"content": choice.text or None, "tool_calls": calls}
        return super()._choice(prompt, index, choice) | {"message": message}

    def _whole_extra(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._requests[0].prompt_token_ids} if self._wanted.token_ids else {}

    def _logprobs(
        self, number: int, ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]
    ) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, ids, logprobs)


def _said(delta: pb.TokenDelta) -> dict[str, Any]:
    """Returns the next part of an assistant's text and calls."""
    parts = []
    for part in delta.tool_calls:
        call = (
            _call(part.id, part.name, part.arguments)
            if part.id
            else {"function": {"arguments": part.arguments}}
        )
        parts.append({"index": part.index} | call)
    return ({"content": delta.text} if delta.text else {}) | {"tool_calls": parts}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class _Progress:
    """The progress of one choice."""

    __slots__ = ("has_begun", "has_logprobs", "last_token_id", "offset", "prompt")

    def __init__(self) -> None:
        self.has_begun = False
        self.last_token_id: int | None = None
        self.has_logprobs = False
        self.prompt = pb.PromptDelta()  # of its prompt, at the first choice of it
        self.offset = 0  # of the next token, in its text
