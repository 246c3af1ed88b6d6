"""The buffer between the router and one client's call."""

import asyncio
from collections import deque

from .events import EmitChoiceEnd, EmitEnd, EmitTokens

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd

MAX_TOKENS_AT_ONCE = 64  # of those that wait; a client that keeps up gets each token as it arrives


class ClientStream:
    """The events that the router has emitted for one client and that the client has not read yet. Consecutive
    tokens of one choice are read together: clients and servers that have fallen behind then spend less on
    each."""

    def __init__(self) -> None:
        self.num_unread = 0  # tokens emitted since `is_handed_over`
        self.is_unread = False  # too much is unread, and the router has been informed
        self.is_handed_over = False  # everything emitted before the client arrived
        self._events: deque[tuple[StreamEvent, int]] = deque()  # event, its tokens that count
        self._came: asyncio.Future[None] | None = None

    def put(self, event: StreamEvent) -> None:
        num_tokens = _num_tokens(event) if self.is_handed_over else 0
        self.num_unread += num_tokens
        self._events.append((event, num_tokens))
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    async def get(self) -> StreamEvent:
        while not self._events:
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        event, num_tokens = self._events.popleft()
        if isinstance(event, EmitTokens) and self._follows(event):
            event, num_tokens = self._together(event, num_tokens)
        self.num_unread -= num_tokens
        return event

    def _follows(self, event: EmitTokens) -> bool:
        """Whether the next event brings more tokens of the same choice."""
        if not self._events:
            return False
        following = self._events[0][0]
        return isinstance(following, EmitTokens) and following.choice == event.choice

    def _together(self, event: EmitTokens, num_tokens: int) -> tuple[EmitTokens, int]:
        tokens = list(event.tokens)
        while self._follows(event) and len(tokens) < MAX_TOKENS_AT_ONCE:
            following, count = self._events.popleft()
            assert isinstance(following, EmitTokens)
            tokens += following.tokens
            num_tokens += count
        return EmitTokens(event.request_id, event.choice, tuple(tokens)), num_tokens


def _num_tokens(event: StreamEvent) -> int:
    return len(event.tokens) if isinstance(event, EmitTokens) else 0
