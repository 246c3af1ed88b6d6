"""Ctrl-C and SIGTERM while a command or a cluster starts: the process ends at once, with what it has started.

Ray starts in C++ code, which can crash by an exception out of a signal's handler, or by the shutdown of what
is half made. So nothing is unwound: the handler ends other processes, removes folders, and exits."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = b"interrupted\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The handler of a signal for a process that has nothing to clean up."""
    _report()
    os._exit(128 + number)


@contextmanager
def ending_at_once() -> Iterator[list[Callable[[], None]]]:
    """Within the block a signal ends the process, after the functions that the block has put into the list,
    the last one first. A signal that is ignored stays so."""
    clean_ups: list[Callable[[], None]] = []

    def end(number: int, frame: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        _report()
        try:
            for clean_up in reversed(clean_ups):
                with suppress(Exception):  # the others are to run all the same
                    clean_up()
        finally:
            os._exit(128 + number)

    handlers = {one: signal.getsignal(one) for one in _SIGNALS}
    taken = [one for one, handler in handlers.items() if handler is not signal.SIG_IGN]
    for one in taken:
        signal.signal(one, end)
    try:
        yield clean_ups
    finally:
        for one in taken:
            signal.signal(one, handlers[one])


def _report() -> None:
    with suppress(OSError):  # nobody may read it any more
        os.write(2, INTERRUPTED)
