"""Between the router and one client's call: what was said and not taken yet."""

import asyncio

from .events import EmitChoiceEnd, EmitEnd, EmitTokens

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd


class ClientStream:
    """What the router has said to one client and the client has not taken yet."""

    def __init__(self) -> None:
        self.num_unread = 0  # tokens, of those that came after `is_handed_over`
        self.is_paused = False
        self.is_handed_over = False  # all that was there before its client
        self._queue: asyncio.Queue[tuple[StreamEvent, int]] = asyncio.Queue()  # with the tokens that count

    def put(self, event: StreamEvent) -> None:
        num_tokens = _num_tokens(event) if self.is_handed_over else 0
        self.num_unread += num_tokens
        self._queue.put_nowait((event, num_tokens))

    async def get(self) -> StreamEvent:
        event, num_tokens = await self._queue.get()
        self.num_unread -= num_tokens
        return event


def _num_tokens(event: StreamEvent) -> int:
    return len(event.tokens) if isinstance(event, EmitTokens) else 0
