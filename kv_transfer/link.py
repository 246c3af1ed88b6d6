"""What moves a chunk's bytes: one direction, one pair, one epoch. Slots number the staging ring on either
side."""

from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, ClassVar, Protocol

from ..core.errors import PdserveError
from .interfaces import Slot


class LinkError(PdserveError):
    """The link is of no use any more."""


class PeerLost(LinkError):
    """The other side is gone."""


class TransferTimeout(LinkError):
    """The other side did not keep up."""


class Link(Protocol):
    """A ticket is what `wait` waits for; None says that the operation is done already."""

    name: ClassVar[str]  # one of `choice.LINKS`
    num_slots: int
    slot_bytes: int
    takes_turns: bool  # a process must not have sends of two such links under way

    @property
    def executor(self) -> Executor | None:
        """Where `wait` belongs; None for links that never return a ticket."""
        ...

    def slot(self, slot: int, num_bytes: int) -> Slot:
        """The first `num_bytes` of this side's memory of `slot`."""
        ...

    def send(self, slot: int, num_bytes: int, seq: int) -> Any | None: ...

    def recv(self, slot: int, num_bytes: int, seq: int) -> Any | None: ...

    def wait(self, ticket: Any, timeout_s: float) -> None:
        """Blocks until what the ticket stands for is done. Raises PeerLost or TransferTimeout; the link must
        be killed then."""
        ...

    def kill(self) -> None:
        """Idempotent, never blocks."""
        ...

    @property
    def is_gone(self) -> bool:
        """Killed, and nothing of it is left."""
        ...

    def join(self) -> None:
        """After `kill`: blocks until nothing of the link is left, at most a wait's timeout."""
        ...


def release(slot: Slot) -> None:
    """Take a slot's view back from whoever kept it, so that the ring's memory can go with its link."""
    if isinstance(slot, memoryview):
        with suppress(BufferError):  # somebody built on it; then it goes when they do
            slot.release()
