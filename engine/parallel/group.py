"""The ranks of one instance on one host.

Rank 0 decides. It sends each step's inputs to the others as one message; all compute their parts, and meet in
two sums a layer; rank 0 gets the logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...kernels.ranks import RankLost, RankMemory
from ..batch import Batch
from ..model import ModelInput
from .shard import Shard
from .steps import STEP, STOP, encode_step
from .stream import Leader, Led

__all__ = ["Deadlines", "RankGroup", "RankLost"]


@dataclass(frozen=True)
class Deadlines:
    """How long a rank waits for another before it counts as lost. A death is noticed at once."""

    step_s: float = 10.0  # within a step, where all come at about the same time
    start_s: float = 600.0  # until all have started, and have loaded their weights


class RankGroup:
    """One rank's view of the group, each rank being a process: the `Collectives` of its model, and messages.

    A rank that dies is noticed by the next call that waits for it."""

    def __init__(self, memory: RankMemory, deadlines: Deadlines) -> None:
        self.shard = Shard(memory.rank, memory.num_ranks)
        self.memory = memory
        self._deadlines = deadlines
        self.leader = Leader(memory) if memory.rank == 0 else None
        self.led = Led(memory) if memory.rank > 0 else None

    @classmethod
    def create(cls, num_ranks: int, deadlines: Deadlines = Deadlines()) -> "RankGroup":
        """Returns rank 0's view of a new group; the other ranks join by its `address`. Raises ConfigError for
        a number of ranks other than 1, 2, 4 or 8, UnavailableError without native kernels."""
        Shard(0, num_ranks)
        return cls(RankMemory.create(num_ranks), deadlines)

    @classmethod
    def join(cls, address: str, rank: int, deadlines: Deadlines = Deadlines()) -> "RankGroup":
        """Raises RankLost where rank 0 is gone."""
        return cls(RankMemory.join(address, rank), deadlines)

    @property
    def address(self) -> str:
        """Returns where the processes of the other ranks find the group."""
        return self.memory.address

    def begin_step(self, batch: Batch, inputs: ModelInput) -> None:
        """Rank 0: has the other ranks compute a step. Raises RankLost."""
        self.send(STEP, encode_step(batch, inputs))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory.all_reduce(x, self._deadlines.step_s)

    def gather(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        return self.memory.gather(x, widths, self._deadlines.step_s)

    @contextmanager
    def start(self) -> Iterator[None]:
        """Encloses what a rank does until it is ready for steps. Ends when all ranks are, and ends the group
        where this rank fails, so that none waits for it. Raises RankLost."""
        try:
            yield
            self.memory.meet(self._deadlines.start_s)
        except BaseException:
            self.abort()
            raise

    def exchange(self, data: bytes) -> list[bytes]:
        """Returns each rank's data, of equal length on all ranks; waits as long as a start takes."""
        return self.memory.exchange(data, self._deadlines.start_s)

    def send(self, kind: int, payload: bytes | bytearray = b"") -> None:
        """Rank 0: sends a message to all other ranks, which get it in the order of steps. Any thread. Raises
        RankLost."""
        assert self.leader is not None, "only rank 0 decides"
        self.leader.send(kind, payload, self._deadlines.step_s)

    def reply(self, kind: int, payload: bytes | bytearray = b"") -> None:
        """Other ranks: sends a message to rank 0, which finds it in `leader.replies`. Any thread. Raises
        RankLost."""
        assert self.led is not None, "rank 0 does not talk to itself"
        self.led.reply(kind, payload, self._deadlines.step_s)

    def stop(self) -> None:
        """Rank 0: ends the others when they have done all that was sent before. Raises RankLost."""
        self.send(STOP)

    def abort(self) -> None:
        """Ends every rank's calls, now and later, by RankLost. Any thread."""
        self.memory.abort()

    def close(self) -> None:
        """Leaves the group."""
        self.memory.close()
