"""Events that wait for a client are read in order, tokens of one choice together, in bounded portions."""

import asyncio

from hypothesis import given, strategies as st

from pdserve.core.messages import TokenOutput
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.client_stream import MAX_TOKENS_AT_ONCE, ClientStream, StreamEvent
from pdserve.router.events import EmitChoiceEnd, EmitTokens


def tokens(choice: int, *indices: int) -> EmitTokens:
    return EmitTokens(
        "r", choice, tuple(TokenOutput(TransferId("r", 0), choice, index, 7) for index in indices)
    )


def end(choice: int) -> EmitChoiceEnd:
    return EmitChoiceEnd("r", choice, FinishReason.LENGTH)


async def take(stream: ClientStream, count: int) -> list[StreamEvent]:
    return [await stream.get() for _ in range(count)]


async def test_waiting_tokens_of_a_choice_are_read_together() -> None:
    stream = ClientStream()
    stream.is_handed_over = True
    for event in (
        tokens(0, 0),
        tokens(0, 1, 2),
        tokens(1, 0),
        tokens(1, 1),
        tokens(0, 3),
        end(0),
        tokens(1, 2),
    ):
        stream.put(event)
    assert stream.num_unread == 7
    assert await take(stream, 5) == [tokens(0, 0, 1, 2), tokens(1, 0, 1), tokens(0, 3), end(0), tokens(1, 2)]
    assert stream.num_unread == 0


async def test_a_client_that_keeps_up_gets_each_token_as_it_arrives() -> None:
    stream = ClientStream()
    for index in range(3):
        waiting = asyncio.ensure_future(stream.get())
        await asyncio.sleep(0)
        stream.put(tokens(0, index))
        assert await waiting == tokens(0, index)


async def test_waiting_can_be_cancelled_and_resumed() -> None:
    stream = ClientStream()
    waiting = asyncio.ensure_future(stream.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    stream.put(tokens(0, 0))
    assert await stream.get() == tokens(0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), max_size=40))
def test_every_token_comes_once_and_in_order(puts: list[tuple[int, int]]) -> None:
    async def run() -> None:
        stream, counts = ClientStream(), [0, 0, 0]
        for choice, count in puts:
            stream.put(tokens(choice, *range(counts[choice], counts[choice] + count)))
            counts[choice] += count
        taken: list[list[int]] = [[], [], []]
        while sum(map(len, taken)) < sum(counts):
            event = await stream.get()
            assert isinstance(event, EmitTokens)
            assert len(event.tokens) < MAX_TOKENS_AT_ONCE + 100
            taken[event.choice] += [token.index for token in event.tokens]
        assert taken == [list(range(count)) for count in counts]

    asyncio.run(run())
