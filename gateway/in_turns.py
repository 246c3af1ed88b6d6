"""Splits work on the loop that is longer than one turn."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

T = TypeVar("T")
STEPS = 256


async def in_turns(items: Iterable[T], every: int = STEPS) -> AsyncIterator[T]:
    """Yields the same items, and yields the loop to other tasks after every few of them."""
    for index, item in enumerate(items, 1):
        yield item
        if index % every == 0:
            await asyncio.sleep(0)
