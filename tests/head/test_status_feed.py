"""The status that all watchers share."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import count

from pdserve.head.status_feed import StatusFeed


class Statuses:
    """Each status is the number of those computed before it."""

    def __init__(self, max_interval_s: float = 60.0) -> None:
        numbers = count()
        self.feed: StatusFeed[int] = StatusFeed(lambda: next(numbers), 0.0, max_interval_s)


async def test_an_update_is_computed_once_for_all_watchers() -> None:
    feed = Statuses().feed
    watches = [feed.watch() for _ in range(20)]
    first = [await anext(watch) for watch in watches]
    assert {await anext(watch) for watch in watches[:-1]} == {first[-1]}
    for number in range(first[-1] + 1, first[-1] + 4):
        following = [asyncio.ensure_future(anext(watch)) for watch in watches]
        await asyncio.sleep(0)
        feed.change()
        assert set(await asyncio.gather(*following)) == {number}


async def test_a_slow_watcher_gets_the_latest_status_at_once() -> None:
    feed = Statuses().feed
    slow, quick = feed.watch(), feed.watch()
    await anext(slow)
    await anext(quick)
    for _ in range(3):
        feed.change()
        newest = await anext(quick)
    assert await anext(slow) == newest


async def test_a_status_comes_from_time_to_time_without_any_change() -> None:
    watch = Statuses(max_interval_s=0.001).feed.watch()
    assert [await anext(watch) for _ in range(3)] == [0, 1, 2]


async def test_a_watcher_that_leaves_does_not_end_the_others_wait() -> None:
    feed = Statuses().feed
    leaves, stays = feed.watch(), feed.watch()
    await anext(leaves)
    await anext(stays)
    gone = asyncio.ensure_future(anext(leaves))
    waiting = asyncio.ensure_future(anext(stays))
    await asyncio.sleep(0)
    gone.cancel()
    feed.change()
    await waiting


async def test_closing_ends_each_watch() -> None:
    feed = Statuses().feed
    watches = [feed.watch(), feed.watch()]
    for watch in watches:
        await anext(watch)
    waiting = [asyncio.ensure_future(_count(watch)) for watch in watches]
    await asyncio.sleep(0)
    feed.close()
    assert all(count <= 2 for count in await asyncio.gather(*waiting))


async def _count(watch: AsyncGenerator[int, None]) -> int:
    return len([status async for status in watch])
