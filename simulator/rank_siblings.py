"""The connections between the ranks of a simulated instance: production's `RankWatch` at both ends of each,
and steps that end when every rank has computed its part."""

from collections.abc import Callable, Sequence
from random import Random

from ..core.messages import HEARTBEAT_S
from ..worker.rank_watch import MAX_SILENT_BEATS, RankWatch
from .virtual_time import VirtualProcess, VirtualTime

LATENCY_S = 0.00005  # of a message within a host
KEEPER_S = 0.01  # until the processes that a worker leaves behind are killed
MAX_KEPT_BEATS = 2  # of rank 0, in which it has to notice what its watch reports


class _Line:
    """One direction of a connection: messages arrive in order, and none is lost."""

    def __init__(self, time: VirtualTime, rng: Random, target: VirtualProcess) -> None:
        self.late_s = 0.0
        self.cut_until_s = 0.0
        self._time, self._rng, self._target = time, rng, target
        self._last_s = 0.0

    def send(self, call: Callable[[], object]) -> None:
        at_s = self._time.now_s + LATENCY_S * (1.0 + self._rng.random()) + self.late_s
        self._last_s = max(self._last_s + 1e-9, at_s, self.cut_until_s)
        self._target.call_at(self._last_s, call)


class _Other:
    """A rank that computes and watches rank 0."""

    def __init__(self, siblings: "Siblings", rank: int, process: VirtualProcess, rng: Random) -> None:
        self.rank = rank
        self.process = process
        self.to_zero = _Line(siblings.time, rng, siblings.zero)
        self.from_zero = _Line(siblings.time, rng, process)
        self.num_gone_beats = 0  # of rank 0, since this one has ended or stands still
        self._siblings = siblings
        self._watch = RankWatch((0,))
        process.every(HEARTBEAT_S, self._beat)
        process.when_it_dies(lambda: self.to_zero.send(lambda: siblings.ended(self)))
        siblings.zero.when_it_dies(lambda: self.from_zero.send(lambda: self._end(self._watch.ended(0))))

    def heard(self) -> None:
        self._watch.heard(0)

    def compute(self, duration_s: float, done: Callable[[], None]) -> None:
        self.process.call_later(duration_s, lambda: self.to_zero.send(done))

    def _beat(self) -> None:
        self._end(self._watch.beat())
        self.to_zero.send(lambda: self._siblings.heard(self))

    def _end(self, why: str | None) -> None:
        if why is not None:
            self.process.kill()


class Siblings:
    """Rank 0's view of ranks 1 and above; perhaps there are none."""

    def __init__(
        self,
        time: VirtualTime,
        zero: VirtualProcess,
        others: Sequence[VirtualProcess],
        on_lost: Callable[[str], None],
        violation: Callable[[str], None],
    ) -> None:
        """`on_lost` is called in rank 0's process with the reason why the instance is over."""
        self.time = time
        self.zero = zero
        self._on_lost = on_lost
        self._violation = violation
        rng = Random(f"siblings of {zero.name} {time.now_s}")
        self._others = [_Other(self, rank, process, rng) for rank, process in enumerate(others, 1)]
        self._watch = RankWatch(range(1, 1 + len(others)))
        if others:
            zero.every(HEARTBEAT_S, self._beat)
            zero.when_it_dies(lambda: time.call_later(KEEPER_S, self._clean_up))

    def compute(self, duration_s: float, done: Callable[[], None]) -> None:
        """Calls `done` when all ranks have computed their parts of a step; they wait for each other."""
        others = self._others if duration_s else []  # without work there is no step
        num_left = 1 + len(others)

        def part_done() -> None:
            nonlocal num_left
            num_left -= 1
            if not num_left:
                done()

        for other in others:
            other.from_zero.send(lambda other=other: other.compute(duration_s, part_done))  # type: ignore[misc]
        self.zero.call_later(duration_s, part_done)

    def heard(self, other: _Other) -> None:
        self._watch.heard(other.rank)

    def ended(self, other: _Other) -> None:
        self._lose(self._watch.ended(other.rank))

    def cut(self, process: VirtualProcess, duration_s: float) -> None:
        """Holds back all that passes between a rank and rank 0."""
        (other,) = (one for one in self._others if one.process is process)
        other.to_zero.cut_until_s = other.from_zero.cut_until_s = self.time.now_s + duration_s

    def delay(self, process: VirtualProcess, late_s: float, duration_s: float) -> None:
        """Lets what a rank sends arrive late for a while."""
        (line,) = (one.to_zero for one in self._others if one.process is process)
        line.late_s = late_s
        self.time.call_later(duration_s, lambda: setattr(line, "late_s", 0.0))

    @property
    def num_left(self) -> int:
        """The number of other ranks that run."""
        return sum(other.process.is_alive for other in self._others)

    def _beat(self) -> None:
        for other in self._others:
            other.from_zero.send(other.heard)
            self._check(other)
        self._lose(self._watch.beat())

    def _check(self, other: _Other) -> None:
        """Checks that rank 0 does not go on without another."""
        process = other.process
        other.num_gone_beats = 0 if process.is_alive and not process.is_frozen else other.num_gone_beats + 1
        if other.num_gone_beats > (MAX_SILENT_BEATS if process.is_alive else 0) + MAX_KEPT_BEATS:
            what = "stands still" if process.is_alive else "has ended"
            self._violation(f"{self.zero.name} is kept, though its rank {other.rank} {what}")

    def _lose(self, why: str | None) -> None:
        if why is not None:
            self._on_lost(why)

    def _clean_up(self) -> None:
        for other in self._others:
            other.process.kill()
