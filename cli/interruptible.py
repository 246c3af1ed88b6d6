"""gRPC streams for a main thread that Ctrl-C interrupts.

KeyboardInterrupt is raised wherever the main thread is. Inside gRPC it can leave a lock held for ever, which
blocks every later call of the channel. So another thread, which gets no interrupts, reads the stream.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Message = TypeVar("Message")
Received = TypeVar("Received", covariant=True)


class StreamingCall(Protocol[Received]):
    """A call whose answers are a stream."""

    def __iter__(self) -> Iterator[Received]: ...
    def cancel(self) -> Any: ...


@contextmanager
def interruptible(stream: StreamingCall[Message]) -> Iterator[Iterator[Message]]:
    """Yields a call's messages; they end, or raise, as it does. It is cancelled when the block ends."""
    arrived: queue.SimpleQueue[Message | _End] = queue.SimpleQueue()

    def read() -> None:
        error: Exception | None = None
        try:
            for message in stream:
                arrived.put(message)
        except Exception as ended_by:  # raised again by the main thread
            error = ended_by
        arrived.put(_End(error))

    threading.Thread(target=read, name="stream-reader", daemon=True).start()
    try:
        yield _messages(arrived)
    finally:
        stream.cancel()


class _End:
    def __init__(self, error: Exception | None) -> None:
        self.error = error


def _messages(arrived: "queue.SimpleQueue[Message | _End]") -> Iterator[Message]:
    while not isinstance(message := arrived.get(), _End):
        yield message
    if message.error is not None:
        raise message.error
