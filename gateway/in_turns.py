"""Work on the loop that is longer than a turn of it, in pieces."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

T = TypeVar("T")
STEPS = 256


async def in_turns(items: Iterable[T], every: int = STEPS) -> AsyncIterator[T]:
    """The same, with a turn for everybody else after so many of them."""
    for index, item in enumerate(items, 1):
        yield item
        if index % every == 0:
            await asyncio.sleep(0)
