"""The endpoint's loop while its store has works under way: what it polls, reports and serves meanwhile."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pdserve.kv_transfer import polling_loop
from pdserve.kv_transfer.link import LinkError
from pdserve.kv_transfer.store_work import StoreWaits

from .support import WAIT_S


class Work:
    """Done when the test releases it."""

    def __init__(self, checksum: int = 0) -> None:
        self.is_reached = False
        self.error: Exception | None = None
        self.was_asked = asyncio.Event()  # set at every poll
        self.num_collected = 0
        self._num_asked = 0
        self._checksum = checksum

    def is_done(self) -> bool:
        self._num_asked += 1
        if self._num_asked > 3:
            asyncio.get_running_loop().call_soon_threadsafe(self.was_asked.set)  # ends the loop's pause
        if self.error is not None:
            raise self.error
        return self.is_reached

    def collect(self) -> int:
        self.num_collected += 1
        return self._checksum


class Reports(list[int | BaseException]):
    """Lets a test wait for the expected number of reports."""

    def __init__(self, num_expected: int) -> None:
        super().__init__()
        self._num_expected = num_expected
        self.are_there = asyncio.Event()

    def append(self, result: int | BaseException) -> None:
        super().append(result)
        if len(self) == self._num_expected:
            self.are_there.set()


@pytest.fixture(params=["select", "sleep"], autouse=True)
def _way_to_pause(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`select` takes no descriptor above 1023."""
    if request.param == "sleep":
        monkeypatch.setattr(polling_loop, "_MAX_SELECT_FD", -1)


def run(test: Callable[[StoreWaits], Coroutine[Any, Any, None]]) -> None:
    waits = StoreWaits()

    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await test(waits)

    with asyncio.Runner(loop_factory=lambda: polling_loop.polling_loop(waits)) as runner:
        runner.run(limited())


def test_each_work_is_reported_once_and_in_order() -> None:
    async def test(waits: StoreWaits) -> None:
        reported = Reports(3)
        works = [Work(number) for number in range(3)]
        for work in works:
            waits.add(work, reported.append)
        works[1].is_reached = works[2].is_reached = True
        await works[0].was_asked.wait()
        assert not reported, "works behind one that is under way were reported"
        works[0].is_reached = True
        await reported.are_there.wait()
        assert reported == [0, 1, 2] and all(work.num_collected == 1 for work in works)
        assert waits.is_idle

    run(test)


def test_the_loop_wakes_for_a_work_when_nothing_else_happens() -> None:
    async def test(waits: StoreWaits) -> None:
        work, reported = Work(7), asyncio.get_running_loop().create_future()
        waits.add(work, reported.set_result)
        timer = threading.Timer(0.01, lambda: setattr(work, "is_reached", True))
        timer.start()
        assert await reported == 7
        timer.join()

    run(test)


def test_timers_and_other_threads_are_served_while_a_work_is_late() -> None:
    async def test(waits: StoreWaits) -> None:
        loop, work = asyncio.get_running_loop(), Work()
        waits.add(work, lambda _: None)
        called = loop.create_future()
        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(called.set_result, None))
        thread.start()
        await called
        thread.join()
        timed = loop.create_future()
        loop.call_later(0.001, timed.set_result, None)
        await timed
        await work.was_asked.wait()
        assert not waits.is_idle
        work.is_reached = True
        await waits.finish(WAIT_S)

    run(test)


def test_a_failed_work_is_reported_with_its_error_and_the_next_continues() -> None:
    async def test(waits: StoreWaits) -> None:
        reported = Reports(2)
        bad, good = Work(), Work(1)
        bad.error, good.is_reached = RuntimeError("CUDA error"), True
        waits.add(bad, reported.append)
        waits.add(good, reported.append)
        await reported.are_there.wait()
        assert reported == [bad.error, 1]

    run(test)


def test_a_report_that_raises_does_not_suppress_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def test(waits: StoreWaits) -> None:
        works, reported = [Work(), Work(1)], Reports(1)

        def raises(_: object) -> None:
            raise ValueError("a bug")

        waits.add(works[0], raises)
        waits.add(works[1], reported.append)
        works[0].is_reached = works[1].is_reached = True
        await reported.are_there.wait()
        assert "a bug" in caplog.text
        await waits.finish(WAIT_S)

    run(test)


def test_finish_gives_up_on_late_works_and_reports_them() -> None:
    async def test(waits: StoreWaits) -> None:
        reported = Reports(1)
        late = Work()
        waits.add(late, reported.append)
        await waits.finish(0.001)
        assert isinstance(reported[0], LinkError) and "closed before the device was done" in str(reported[0])
        assert late.num_collected == 0

    run(test)
