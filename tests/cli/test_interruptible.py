"""A stream that Ctrl-C interrupts: it is read on another thread, and cancelled when its reader leaves."""

import os
import queue
import signal
import threading
from collections.abc import Iterator

import pytest

from pdserve.cli.interruptible import interruptible


class Scripted:
    """A stream of what the test puts into it; an exception is raised."""

    def __init__(self) -> None:
        self.coming: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        self.readers: set[threading.Thread] = set()
        self.is_cancelled = False

    def __iter__(self) -> Iterator[int]:
        while True:
            self.readers.add(threading.current_thread())
            item = self.coming.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item

    def cancel(self) -> None:
        self.is_cancelled = True
        self.coming.put(None)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_interrupted(messages: Iterator[int]) -> None:
    """Waits for a message that never arrives, interrupted by Ctrl-C."""
    threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
    next(messages)


def test_messages_come_in_order_and_end_with_the_stream() -> None:
    stream = Scripted()
    for item in (1, 2, None):
        stream.coming.put(item)
    with interruptible(stream) as messages:
        assert list(messages) == [1, 2]
    assert threading.main_thread() not in stream.readers


def test_the_error_that_ends_a_stream_is_raised_behind_its_messages() -> None:
    stream = Scripted()
    stream.coming.put(1)
    stream.coming.put(ValueError("broken"))
    with interruptible(stream) as messages:
        assert next(messages) == 1
        with pytest.raises(ValueError, match="broken"):
            next(messages)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_waiting_and_cancels_the_stream() -> None:
    stream = Scripted()
    stream.coming.put(1)
    with interruptible(stream) as messages:
        assert next(messages) == 1
        assert threading.main_thread() not in stream.readers
        with pytest.raises(KeyboardInterrupt):
            wait_interrupted(messages)
    assert stream.is_cancelled
