"""Links move a chunk's bytes: one direction, one pair, one epoch. Slots number the staging ring on either
side."""

from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, ClassVar, Protocol

from ..core.errors import PdserveError
from .interfaces import Slot


class LinkError(PdserveError):
    """The link is no longer usable."""


class PeerLost(LinkError):
    """The other side is gone."""


class TransferTimeout(LinkError):
    """The other side was too slow."""


class Link(Protocol):
    """Moves chunks' bytes. `wait` waits for a ticket; None says that the operation is done already."""

    name: ClassVar[str]  # one of `choice.LINKS`
    num_slots: int
    slot_bytes: int
    takes_turns: bool  # a process must not have sends of two such links under way

    @property
    def executor(self) -> Executor | None:
        """The thread on which `wait` runs; None for links that never return a ticket."""
        ...

    def slot(self, slot: int, num_bytes: int) -> Slot:
        """Returns the first `num_bytes` of this side's memory of `slot`."""
        ...

    def send(self, slot: int, num_bytes: int, seq: int) -> Any | None: ...

    def recv(self, slot: int, num_bytes: int, seq: int) -> Any | None: ...

    def wait(self, ticket: Any, timeout_s: float) -> None:
        """Blocks until the ticket's operation is done. Raises PeerLost or TransferTimeout; the link must then
        be killed."""
        ...

    def kill(self) -> None:
        """Kills the link. Idempotent, never blocks."""
        ...

    @property
    def is_gone(self) -> bool:
        """Whether the link is killed and all its resources are released."""
        ...

    def join(self) -> None:
        """Blocks, after `kill`, until the link has released everything, for at most the timeout of one
        wait."""
        ...


def release(slot: Slot) -> None:
    """Releases a slot's view, whichever component kept it, so that the ring's memory can be freed with its
    link."""
    if isinstance(slot, memoryview):
        with suppress(BufferError):  # another view was built on it; it is then released with that one
            slot.release()
