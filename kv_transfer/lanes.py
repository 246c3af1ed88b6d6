"""Threads for calls that block, shared by all links of an endpoint."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

_MAX_THREADS = 4096  # far more than links are ever busy at once: a lane must not wait for another


class Lanes:
    """Has as many threads as lanes were ever busy at once, however many lanes there are."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix=name)

    def lane(self) -> "Lane":
        """Returns a lane of its own for one link."""
        return Lane(self._threads)

    def close(self) -> None:
        """Ends each thread as soon as it has nothing to do; lanes accept no more calls."""
        self._threads.shutdown(wait=False)


class Lane(Executor):
    """Runs one call at a time, in the order of the calls, and holds a thread only while it has one to run."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._changed = threading.Condition()  # guards the three below
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_busy = False
        self._is_shut = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        future: Future[Any] = Future()
        with self._changed:
            if self._is_shut:
                raise RuntimeError("the lane is shut down")
            if not self._is_busy:
                try:
                    self._threads.submit(self._run)
                except RuntimeError as error:  # no thread can be started: mostly as the process ends
                    future.set_exception(error)
                    return future
                self._is_busy = True
            self._calls.append((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor`."""
        with self._changed:
            self._is_shut = True
            if cancel_futures:
                for future, _ in self._calls:
                    future.cancel()
            if wait:
                self._changed.wait_for(lambda: not self._is_busy)

    def _run(self) -> None:
        while (call := self._next()) is not None:
            future, run = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(run())
            except BaseException as error:  # it is the future's, as in any executor
                future.set_exception(error)
            del call, future, run  # what they hold must not wait for the lane's next call

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            if self._calls:
                return self._calls.popleft()
            self._is_busy = False
            self._changed.notify_all()
            return None
