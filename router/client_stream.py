"""The buffer between the router and one client's call."""

import asyncio
from collections import deque

from ..core.held_bytes import HeldBytes, Holding, TooLarge, TooManyBytes
from ..core.messages import TokenOutput
from .events import EmitChoiceEnd, EmitEnd, EmitTokens

StreamEvent = EmitTokens | EmitChoiceEnd | EmitEnd

# of those that wait, an alternative counting as a token; a client that keeps up gets each token as it arrives
MAX_TOKENS_AT_ONCE = 64
# as measured with tracemalloc: a token in an event of its own, a prompt's position, an alternative to either
TOKEN_BYTES, POSITION_BYTES, ALTERNATIVE_BYTES = 500, 120, 120
COUNTED_BYTES = 16 << 10  # a stream's bytes are counted in steps of this size: those that are read need none


class ClientStream:
    """The events that the router has emitted for one client and that the client has not read yet. Consecutive
    tokens of one choice are read together: clients and servers that have fallen behind then spend less on
    each.

    The client holds an event's bytes until it asks for the next one. When it holds too much in all, this
    stream is over, and loses what was not read."""

    def __init__(self, client: str, held: HeldBytes) -> None:
        """`held`: by all streams; `client`: whom this one counts for."""
        self.num_unread = 0  # tokens emitted since `is_handed_over`
        self.is_unread = False  # too much is unread, and the router has been informed
        self.is_handed_over = False  # everything emitted before the client arrived
        # event, its tokens and bytes that count
        self._events: deque[tuple[StreamEvent, int, int]] = deque()
        self._came: asyncio.Future[None] | None = None
        self._held = Holding(held, client)
        self._num_bytes = 0  # of the events, and of those that were read last
        self._num_bytes_read = 0  # of these
        self._overflow: TooLarge | TooManyBytes | None = None

    def put(self, event: StreamEvent) -> bool:
        """Returns False when the stream is over, as its client holds too much."""
        if self._overflow is None:
            self._put(event)
        if self._came is not None and not self._came.done():
            self._came.set_result(None)
        return self._overflow is None

    def _put(self, event: StreamEvent) -> None:
        num_tokens, num_bytes = (_num_tokens(event), _num_bytes(event)) if self.is_handed_over else (0, 0)
        self._num_bytes += num_bytes
        try:
            self._count_bytes()
        except (TooLarge, TooManyBytes) as error:
            self._overflow = error
            self.close()
            return
        self.num_unread += num_tokens
        self._events.append((event, num_tokens, num_bytes))

    def close(self) -> None:
        """Drops what was not read."""
        self._events.clear()
        self._num_bytes = self._num_bytes_read = 0
        self._count_bytes()

    def _count_bytes(self) -> None:
        """Raises TooLarge or TooManyBytes."""
        wanted = self._num_bytes - self._num_bytes % COUNTED_BYTES
        if wanted > self._held.num_bytes:
            self._held.take(wanted - self._held.num_bytes)
        elif wanted < self._held.num_bytes:
            self._held.release(self._held.num_bytes - wanted)

    async def get(self) -> StreamEvent:
        """Raises TooLarge or TooManyBytes."""
        self._num_bytes -= self._num_bytes_read
        self._num_bytes_read = 0
        self._count_bytes()
        while not self._events:
            if self._overflow is not None:
                raise self._overflow
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        event, num_tokens, self._num_bytes_read = self._events.popleft()
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
        while self._follows(event) and _num_numbers(tokens) < MAX_TOKENS_AT_ONCE:
            following, count, num_bytes = self._events.popleft()
            assert isinstance(following, EmitTokens)
            tokens += following.tokens
            num_tokens += count
            self._num_bytes_read += num_bytes
        return EmitTokens(event.request_id, event.choice, tuple(tokens)), num_tokens


def _num_tokens(event: StreamEvent) -> int:
    return len(event.tokens) if isinstance(event, EmitTokens) else 0


def _num_numbers(tokens: list[TokenOutput]) -> int:
    """Returns the tokens and alternatives; all tokens of a choice have about as many."""
    return len(tokens) * (1 + len(tokens[0].top_logprobs))


def _num_bytes(event: StreamEvent) -> int:
    if not isinstance(event, EmitTokens):
        return TOKEN_BYTES
    first = event.tokens[0]
    num_bytes = len(event.tokens) * TOKEN_BYTES
    if first.logprob is None and not first.prompt_logprobs:
        return num_bytes
    return num_bytes + sum(map(_num_bytes_beside, event.tokens))


def _num_bytes_beside(token: TokenOutput) -> int:
    """Returns the bytes of a token's log probabilities; all positions of a prompt have as many."""
    positions = token.prompt_logprobs
    per_position = POSITION_BYTES + len(positions[0].top) * ALTERNATIVE_BYTES if positions else 0
    return len(token.top_logprobs) * ALTERNATIVE_BYTES + len(positions) * per_position
