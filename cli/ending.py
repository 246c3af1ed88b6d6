"""Ctrl-C and SIGTERM while a command or a cluster starts: the process ends at once, with what it has started.

Ray starts in C++ code, which can crash by an exception out of a signal's handler, or by the shutdown of what
is half made. So nothing is unwound: the handler ends other processes, removes folders, and exits."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = b"interrupted\n"
CLEAR = b"\r\x1b[K\x1b[?25h"  # the line of a terminal that shows progress; the cursor is back
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """The handler of a signal for a process that has nothing to clean up."""
    _report()
    os._exit(128 + number)


@contextmanager
def ending_at_once(known: list[Callable[[], None]] | None = None) -> Iterator[list[Callable[[], None]]]:
    """Within the block a signal ends the process, after the functions that the block has put into the list,
    or that are `known`, the last one first. A signal that is ignored stays so."""
    clean_ups = [] if known is None else known

    def end(number: int, frame: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        try:
            for clean_up in reversed(clean_ups):
                with suppress(Exception):  # the others are to run all the same
                    clean_up()
        finally:
            _report()
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
        os.write(2, CLEAR + INTERRUPTED if os.isatty(2) else INTERRUPTED)
