"""Between the router and one client's call: what was said and not taken yet."""

import asyncio
from collections import deque

from .events import EmitChoiceEnd, EmitEnd, EmitTokens

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd

MAX_TOKENS_AT_ONCE = 64  # of those that wait; a client that keeps pace gets each as it comes


class ClientStream:
    """What the router has said to one client and the client has not taken yet. Tokens of a choice that wait
    one behind the other are taken together: when clients or doors are behind, they have less to do for
    each."""

    def __init__(self) -> None:
        self.num_unread = 0  # tokens, of those that came after `is_handed_over`
        self.is_unread = False  # too much is unread, and the router knows
        self.is_handed_over = False  # all that was there before its client
        self._events: deque[tuple[StreamEvent, int]] = deque()  # with the tokens that count
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
