"""The limits of a process that does risky work for another one, and may die of it: processor time by job,
memory, no core dump. Jobs in Python can be ended without the process.

It is called inside that process: the grammar process, the intake process, and the one that loads tokenizers.
Their parents run the first two by `limited_child`.
"""

import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def set_up(niceness: int = 0) -> None:
    """Begins a limited process: its owner decides when it ends, and a limit that is passed ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for limit in (signal.SIGPROF, signal.SIGALRM):  # without handlers; the parent may have ignored them
        signal.signal(limit, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {limit})
    os.nice(niceness)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve_or_die(serve: Callable[[], None]) -> None:
    """Runs `serve`. An exception ends the process; MemoryError by an abort, as libraries do."""
    try:
        serve()
    except MemoryError:
        os.abort()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Around a job: SIGPROF ends the process when it has used so much processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class OutOfTime(BaseException):
    """A job has used the processor time of its `soft_limits`. Not an Exception, so that the job's own
    handlers do not catch it."""


@contextmanager
def soft_limits(seconds: float, num_bytes: int) -> Iterator[None]:
    """Around a job in Python on the main thread: raises OutOfTime in it when it has used so much processor
    time, and MemoryError beyond `num_bytes` of new address space. The process goes on. A call into C is not
    interrupted: `cpu_limit` ends it, with the process."""

    def expire(*_: object) -> None:
        raise OutOfTime

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = num_bytes + address_space()
    handler = signal.signal(signal.SIGVTALRM, expire)
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard)
    )
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)


def limit_memory(num_bytes: int) -> None:
    """Bounds the address space to `num_bytes` beside what is taken already; never to more than before."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    num_bytes += address_space()
    num_bytes = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data`, over as many writes as it takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
