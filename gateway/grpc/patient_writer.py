"""Sends a call's messages to a client that may stop reading."""

import asyncio
from types import TracebackType
from typing import Any

import grpc

from ..translate import ClientStalled, write


class PatientWriter:
    """Gives the client `max_unread_s` to have room for each message. One timer watches all writes of the
    call: a timeout of its own for each token would cost a microsecond or two."""

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]", max_unread_s: float) -> None:
        self._context = context
        self._max_unread_s = max_unread_s
        self._loop = asyncio.get_running_loop()
        self._since_s: float | None = None  # when the write that is under way began
        self._is_stalled = False

    async def __aenter__(self) -> "PatientWriter":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._num_cancellations = task, task.cancelling()
        self._timer = self._loop.call_later(self._max_unread_s, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    async def write(self, message: object) -> None:
        """Raises ClientStalled if the client has no room for the message in time, ClientGone if the call is
        over."""
        self._since_s = self._loop.time()
        try:
            await write(self._context, message)
        except asyncio.CancelledError:
            if not self._is_stalled or self._task.uncancel() > self._num_cancellations:
                raise
            raise ClientStalled(self._max_unread_s) from None
        finally:
            self._since_s = None

    def _look(self) -> None:
        now_s = self._loop.time()
        due_s = (now_s if self._since_s is None else self._since_s) + self._max_unread_s
        if now_s >= due_s:
            self._is_stalled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(due_s, self._look)
