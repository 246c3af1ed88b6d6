"""Events that wait for a client are read in order, tokens of one choice together, in bounded portions."""

import asyncio

from hypothesis import given, strategies as st

from pdserve.core.held_bytes import HeldBytes
from pdserve.core.messages import TokenLogprobs, TokenOutput
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
    stream = ClientStream("alice", HeldBytes(1 << 30))
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
    stream = ClientStream("alice", HeldBytes(1 << 30))
    for index in range(3):
        waiting = asyncio.ensure_future(stream.get())
        await asyncio.sleep(0)
        stream.put(tokens(0, index))
        assert await waiting == tokens(0, index)


async def test_waiting_can_be_cancelled_and_resumed() -> None:
    stream = ClientStream("alice", HeldBytes(1 << 30))
    waiting = asyncio.ensure_future(stream.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    stream.put(tokens(0, 0))
    assert await stream.get() == tokens(0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), max_size=40))
def test_every_token_comes_once_and_in_order(puts: list[tuple[int, int]]) -> None:
    async def run() -> None:
        stream, counts = ClientStream("alice", HeldBytes(1 << 30)), [0, 0, 0]
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


async def test_log_probabilities_count_as_what_is_unread_until_the_next_event_is_wanted() -> None:
    held = HeldBytes(64 << 20)
    stream = ClientStream("alice", held)
    stream.is_handed_over = True
    position = TokenLogprobs(-1.0, tuple((rank, -1.0) for rank in range(20)))
    scored = TokenOutput(TransferId("r", 0), 0, 0, 7, prompt_logprobs=(position,) * 2000)
    assert stream.put(EmitTokens("r", 0, (scored,)))
    assert held.total > 2000 * 20 * 100
    await stream.get()
    assert held.total > 2000 * 20 * 100, "it is being sent"
    waiting = asyncio.ensure_future(stream.get())
    await asyncio.sleep(0)
    assert held.total == 0
    waiting.cancel()
    assert all(stream.put(EmitTokens("r", 0, (scored,))) for _ in range(3))
    assert not stream.put(EmitTokens("r", 0, (scored,)))
    assert held.total == 0


async def test_tokens_with_alternatives_are_read_together_in_smaller_portions() -> None:
    stream = ClientStream("alice", HeldBytes(1 << 30))
    for index in range(100):
        ranked = tuple((rank, -1.0) for rank in range(20))
        output = TokenOutput(TransferId("r", 0), 0, index, 7, None, -1.0, ranked)
        stream.put(EmitTokens("r", 0, (output,)))
    first = await stream.get()
    assert isinstance(first, EmitTokens) and len(first.tokens) == 4
