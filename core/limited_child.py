"""The parent's side of a process that does risky work and may die of it: one is started on demand, another
after its death. `limited_process` is the child's side."""

import asyncio
import enum
import logging
import signal
import sys
from abc import ABC, abstractmethod
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

S = TypeVar("S")  # what each process is given first

READ_BYTES = 1 << 18
START_AGAIN_S = 1.0  # after a process that never worked


class Death(enum.Enum):
    """The cause of a process's end."""

    TIME = enum.auto()  # its job exceeded its processor time and is to blame
    RESOURCES = enum.auto()  # out of memory or stack, which its jobs share
    OTHER = enum.auto()  # no job is to blame

    @classmethod
    def of(cls, exit_code: int) -> "Death":
        return _DEATHS.get(exit_code, cls.OTHER)


_DEATHS = {
    -signal.SIGPROF: Death.TIME,
    -signal.SIGSEGV: Death.RESOURCES,
    -signal.SIGBUS: Death.RESOURCES,
    -signal.SIGABRT: Death.RESOURCES,
}


class LimitedChild(ABC, Generic[S]):
    """Owns the process, one after the other, from the first `need` until `stop`. Used on one asyncio loop.

    A subclass says what is talked about with a process, and which of its jobs a death costs."""

    def __init__(self, name: str, set_up: Callable[[], S], module: str, *arguments: str) -> None:
        """`name` is for messages; `set_up` is called once, on a thread, and may take a moment."""
        self._name = name
        self._set_up = set_up
        self._setup: S | None = None  # the same for every process
        self._command = (sys.executable, "-P", "-m", module, *arguments)
        self._needed = asyncio.Event()
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopped = False

    @property
    def pid(self) -> int | None:
        """The process id; None when there is no process."""
        return None if self._process is None else self._process.pid

    def need(self) -> None:
        """Starts a process if there is none, or as soon as the last one is gone."""
        self._needed.set()
        if self._task is None and not self._is_stopped:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends the process; idempotent."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @abstractmethod
    async def _converse(self, process: Process, ended: "asyncio.Future[int]", setup: S) -> None:
        """Gives a new process its `setup`, then jobs until it has ended, which `ended` waits for. Returns, or
        raises EOFError or ConnectionError, when it has; any other exception has it killed."""

    @abstractmethod
    def _on_death(self, death: Death) -> bool:
        """Settles the jobs of a process that is gone, or could not be started. Returns whether it never
        worked, so that the next one is not to be started at once."""

    @abstractmethod
    def _has_jobs(self) -> bool:
        """Whether a process is needed."""

    async def _run(self) -> None:
        while True:
            await self._needed.wait()
            death = await self._live()
            self._needed.clear()
            if self._on_death(death):
                await asyncio.sleep(START_AGAIN_S)
            if self._has_jobs():
                self._needed.set()

    async def _live(self) -> Death:
        """Runs one process from start to end."""
        try:
            if self._setup is None:
                self._setup = await asyncio.to_thread(self._set_up)
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, limit=2 * READ_BYTES, start_new_session=True
            )
        except Exception:  # any error here has to reach those who wait
            log.exception("the %s process cannot be started", self._name)
            return Death.OTHER
        self._process = process
        # one wait for all jobs: asyncio keeps each until the process ends
        ended = asyncio.ensure_future(process.wait())
        try:
            await self._converse(process, ended, self._setup)
        except (ConnectionError, EOFError):
            pass  # it has died
        except asyncio.CancelledError:
            _kill(process)
            await ended
            raise
        except Exception:  # it is silent, or violates the protocol, or we do: it is no longer trusted
            log.exception("the %s process is killed", self._name)
            _kill(process)
            await ended
            return Death.OTHER
        finally:
            self._process = None
        code = await ended
        log.warning("the %s process ended", self._name, extra={"exit_code": code})
        return Death.of(code)


def _kill(process: Process) -> None:
    """Kills the process. Not for one that ends by itself: a kill through subprocess takes its exit code away
    from asyncio."""
    with suppress(ProcessLookupError):
        process.kill()
