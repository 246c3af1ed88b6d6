"""The common part of the two directions' shells: the endpoint around them, and the loop of events and
commands."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Generic, TypeVar

import msgspec

from ..core.messages import KVLayout
from ..core.pump import CommandPump
from .choice import Place
from .config import TransferConfig
from .counters import TransferCounters
from .events import LinkDown, LinkUp
from .interfaces import ControlStream, KVStore, TransferListener
from .link import Link, LinkError
from .own_time import OwnTime
from .parts import Share
from .send_turn import SendTurn
from .store_work import StoreWaits, StoreWork

logger = logging.getLogger(__name__)

# share of a chunk's time for an operation that others wait behind: two in a row that hang cost no other link
TURN_SHARE = 0.4


# (link, ticket, timeout_s, done): calls `done` with the error of the ticket's operation, or None, at its end
Wait = Callable[[Link, Any, float, Callable[[BaseException | None], None]], None]


@dataclass(frozen=True)
class Identity:
    """A worker, and where it keeps its KV."""

    worker_id: str
    incarnation: int
    place: Place

    def __str__(self) -> str:
        return f"{self.worker_id} (incarnation {self.incarnation})"


@dataclass
class Local:
    """This side of every pair: its blocks, its listener, and the state that its pairs share."""

    identity: Identity
    store: KVStore
    listener: TransferListener
    config: TransferConfig
    clock: InitVar[Callable[[], float]] = monotonic
    wait: Wait = field(default_factory=lambda: wait_on_executor)
    rank_share: InitVar[Share | None] = None
    share: Share = field(init=False)  # of the instance's KV; by default, all of it
    time: OwnTime = field(init=False)  # of all its deadlines; the hub ticks it
    epochs: Iterator[int] = field(init=False, default_factory=lambda: count(1))  # of links that we open
    counters: TransferCounters = field(init=False, default_factory=TransferCounters)
    retired: list[Link] = field(init=False, default_factory=list)  # killed, and not yet released
    turn: SendTurn = field(init=False, default_factory=SendTurn)
    store_waits: StoreWaits = field(init=False, default_factory=StoreWaits)

    def __post_init__(self, clock: Callable[[], float], rank_share: Share | None) -> None:
        self.time = OwnTime(clock, self.config.heartbeat_s)
        self.share = rank_share or Share(0, 1, self.store.layout.num_kv_heads)
        if self.store.layout.num_kv_heads != len(self.share.heads):
            raise ValueError(
                f"num_kv_heads: the store holds {self.store.layout.num_kv_heads}, expected"
                f" {len(self.share.heads)} of {self.share}"
            )

    @property
    def layout(self) -> KVLayout:
        """The layout of the KV in all ranks of the instance."""
        return msgspec.structs.replace(self.store.layout, num_kv_heads=self.share.num_kv_heads)

    def notify(self, method: Callable[..., None], *args: object) -> None:
        """Logs the worker's mistakes; they must not affect other transfers."""
        try:
            method(*args)
        except Exception:
            logger.exception("%s failed", method.__qualname__)

    def retire(self, link: Link) -> None:
        """Kills the link, and tracks it until it has released everything."""
        link.kill()
        self.retired = [other for other in (*self.retired, link) if not other.is_gone]


E = TypeVar("E")
C = TypeVar("C")


class Pair(ABC, Generic[E, C]):
    """Feeds a machine and carries out its commands, on the endpoint's thread."""

    def __init__(self, local: Local, heads: range | None, listener: TransferListener | None) -> None:
        """`heads` of the model travel, by default all that this rank holds; `listener` is by default the
        worker's."""
        self.local = local
        self._listener = listener or local.listener
        held = local.share.heads
        heads = held if heads is None else heads
        # counted from the store's first; None: all of them
        self._heads = None if heads == held else range(heads.start - held.start, heads.stop - held.start)
        self._layout = msgspec.structs.replace(local.store.layout, num_kv_heads=len(heads))
        self._pump: CommandPump[C] = CommandPump(self._execute)
        self._channel: ControlStream | None = None
        self._link: Link | None = None
        self._epoch: int | None = None
        self._work = StoreWork(local.store_waits)

    @abstractmethod
    def _handle(self, event: E | LinkUp | LinkDown, now_s: float) -> list[C]:
        """Passes the event to the machine and returns its commands."""

    @abstractmethod
    def _execute(self, command: C) -> None:
        """Carries out a command of the machine."""

    def feed(self, event: E | LinkUp | LinkDown) -> None:
        """Handles `event` and its consequences. An event that arrives meanwhile is decided at once, and
        carried out after the earlier decisions."""
        self._pump.run(self._handle(event, self.local.time()))

    def _adopt(self, channel: ControlStream, link: Link, epoch: int) -> None:
        """The link of `epoch` is up; from now on the stream's messages are the machine's events."""
        self._channel, self._link, self._epoch = channel, link, epoch
        channel.on_message = self._on_message
        channel.on_lost = partial(self._link_failed, epoch)
        self.feed(LinkUp(epoch, link.name, link.num_slots, link.slot_bytes))

    @abstractmethod
    def _on_message(self, message: Any) -> None:
        """Handles a frame of the peer."""

    def _link_failed(self, epoch: int, error: str) -> None:
        """The stream or the link broke; reports it to the machine once, and ignores an old epoch."""
        if epoch == self._epoch:
            self._drop_link()
            self.feed(LinkDown(epoch, error))

    def _drop_link(self) -> None:
        self._epoch = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._link is not None:
            self.local.retire(self._link)
            self._link = None

    def _when_done(self, ticket: Any, then: Callable[[], None]) -> None:
        """Calls `then` when the link's operation is done, unless the link has gone by then."""
        link, epoch = self._link, self._epoch
        assert link is not None and epoch is not None
        timeout_s = self.local.config.chunk_timeout_s * (TURN_SHARE if link.takes_turns else 1.0)
        self.local.wait(link, ticket, timeout_s, partial(self._on_waited, epoch, then))

    def _on_waited(self, epoch: int, then: Callable[[], None], error: BaseException | None) -> None:
        if error is not None and not isinstance(error, LinkError):
            logger.error("waiting for a chunk failed", exc_info=error)
        if epoch != self._epoch:
            return
        if error is not None:
            self._link_failed(epoch, str(error))
        else:
            then()


def wait_on_executor(
    link: Link, ticket: Any, timeout_s: float, done: Callable[[BaseException | None], None]
) -> None:
    """Waits on the link's own thread; calls `done` on the running loop. Asyncio's own mechanism costs a chunk
    twice as much."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        error: BaseException | None = None
        try:
            link.wait(ticket, timeout_s)
        except Exception as problem:  # any error is passed to `done`
            error = problem
        with suppress(RuntimeError):  # the loop has been closed: there is no receiver left
            loop.call_soon_threadsafe(done, error)

    assert link.executor is not None, "it gave a ticket"
    link.executor.submit(wait)
