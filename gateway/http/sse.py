"""Server-sent events: a stream of chunks to a client that reads at its own pace."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response

from ...core.errors import PdserveError
from ..translate import ClientStalled
from .auth_middleware import Receive, Scope, Send
from .errors import describe, error_json

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must forward each event at once


class EventStream(Response):
    """Sends chunks as they arrive; each waits for room in the connection. An error after the first is sent as
    an event too."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], max_unread_s: float) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._max_unread_s = max_unread_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            await self._send(send, self._first)
            try:
                async for chunk in self._rest:
                    await self._send(send, chunk)
            except ClientStalled:
                raise
            except PdserveError as error:
                await self._send(send, b"data: " + error_json(describe(error)[1]) + b"\n\n")
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, chunk: bytes, more: bool = True) -> None:
        await in_time(
            send({"type": "http.response.body", "body": chunk, "more_body": more}), self._max_unread_s
        )


async def in_time(sending: Awaitable[None], max_unread_s: float) -> None:
    """Raises ClientStalled if the client does not read for that long."""
    try:
        async with asyncio.timeout(max_unread_s):
            await sending
    except TimeoutError:
        raise ClientStalled(max_unread_s) from None


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields the items of all streams, each with its stream's number. Ends when all have ended, or with the
    first error."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(streams))
    pumps = [asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            out = await queue.get()
            if isinstance(out, Exception):
                raise out
            if out is None:
                num_open -= 1
            else:
                yield out
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    number: int, stream: AsyncGenerator[T, None], queue: "asyncio.Queue[tuple[int, T] | Exception | None]"
) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put((number, item))
        await queue.put(None)
    except Exception as error:  # any exception: the reader of the queue raises it
        await queue.put(error)
