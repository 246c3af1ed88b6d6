"""An OpenAI-compatible server as a target: `/v1/completions` with token ids for prompts, streamed.

A chunk counts as the tokens that it reports: by `token_ids` of its choice, or by usage that goes on with
each chunk, else as one, as vLLM's benchmark has it. The totals come from the usage at the end where the
server sends one."""

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from .errors import LoadRequestFailed
from .records import CompletedRequest
from .sse import SseParser
from .target import LoadRequest, ModelFacts, OnTokens

_DONE = "[DONE]"


class HttpTarget:
    """`address` is http(s)://HOST:PORT, with or without /v1. `extra` is added to each request's body; `tls`
    names the trusted authorities, by default the public ones."""

    def __init__(
        self,
        address: str,
        model: str = "",
        api_key: str = "",
        extra: Mapping[str, Any] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._model = model
        self._extra = dict(extra or {})
        self._client = httpx.AsyncClient(
            base_url=address.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # the runner cancels requests that take too long
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=True if tls is None else tls,
            trust_env=False,  # a load never goes through a proxy
        )

    async def facts(self) -> ModelFacts:
        try:
            response = await self._client.get("/v1/models")
        except httpx.TransportError as error:
            raise _failed(error) from error
        if response.status_code != httpx.codes.OK:
            raise _refused(response)
        models = _object(response.text).get("data") or []
        wanted = [model for model in models if self._model in ("", model.get("id"))]
        if not wanted:
            raise LoadRequestFailed("http 404", f"the server has no model {self._model!r}")
        self._model = str(wanted[0]["id"])
        return ModelFacts(self._model, max_model_len=wanted[0].get("max_model_len"))

    async def send(self, request: LoadRequest, on_tokens: OnTokens) -> CompletedRequest:
        stream = _Stream(len(request.token_ids), on_tokens)
        try:
            async with self._client.stream("POST", "/v1/completions", json=self._body(request)) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    raise _refused(response)
                async for data in _events(response):
                    if data == _DONE:
                        stream.is_done = True
                    else:
                        stream.take(_object(data))
        except httpx.TransportError as error:
            raise _failed(error) from error
        return stream.answer()

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": list(request.token_ids),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "ignore_eos": request.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }

    async def close(self) -> None:
        await self._client.aclose()


class _Stream:
    """One answer as its chunks come."""

    def __init__(self, num_prompt_tokens: int, on_tokens: OnTokens) -> None:
        self.is_done = False
        self._num_prompt_tokens = num_prompt_tokens
        self._on_tokens = on_tokens
        self._num_seen = 0
        self._usage: dict[str, Any] = {}

    def take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            error = chunk["error"]
            message = error.get("message") if isinstance(error, dict) else error
            raise LoadRequestFailed("error in the stream", str(message))
        usage, choices = chunk.get("usage"), chunk.get("choices") or []
        if isinstance(usage, dict):
            self._usage = usage
        if choices:
            num_tokens = self._num_tokens(choices[0], usage)
            if num_tokens > 0:
                self._num_seen += num_tokens
                self._on_tokens(num_tokens)
            self.is_done = self.is_done or choices[0].get("finish_reason") is not None

    def _num_tokens(self, choice: dict[str, Any], usage: object) -> int:
        if isinstance(choice.get("token_ids"), list):
            return len(choice["token_ids"])
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            return int(usage["completion_tokens"]) - self._num_seen
        # a token may have no text yet, but one that only ends the stream is none
        return 0 if not choice.get("text") and choice.get("finish_reason") is not None else 1

    def answer(self) -> CompletedRequest:
        if not self.is_done:
            raise LoadRequestFailed("cut off", "the stream ended without its ending")
        details = self._usage.get("prompt_tokens_details") or {}
        return CompletedRequest(
            num_prompt_tokens=self._usage.get("prompt_tokens", self._num_prompt_tokens),
            num_output_tokens=self._usage.get("completion_tokens", self._num_seen),
            num_cached_tokens=details.get("cached_tokens"),
        )


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    parser = SseParser()
    async for data in response.aiter_bytes():
        for event in parser.feed(data):
            yield event
    last = parser.finish()
    if last is not None:
        yield last


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise LoadRequestFailed("bad answer", f"expected a JSON object, got {text[:100]!r}")
    return value


def _refused(response: httpx.Response) -> LoadRequestFailed:
    """Returns the failure by status; the message is that of OpenAI's error format, or the body."""
    message: object = response.text
    try:
        body = response.json()
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return LoadRequestFailed(f"http {response.status_code}", str(message)[:300])


def _failed(error: httpx.TransportError) -> LoadRequestFailed:
    if isinstance(error, httpx.ConnectError):
        return LoadRequestFailed("unreachable", str(error))
    return LoadRequestFailed("cut off", str(error) or type(error).__name__)
