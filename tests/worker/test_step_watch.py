"""When a step is taken to hang, on a clock that the tests set."""

from pdserve.core.messages import HEARTBEAT_S
from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.sequence import Sequence
from pdserve.worker.step_watch import FACTOR, FIRST_S, LEAST_S, StepWatch, kind_of

from .chain_model import spec


def prompt(num_tokens: int) -> Batch:
    sequence = Sequence(spec("r", range(num_tokens)), 0, 4096)
    return Batch((ScheduledChunk(sequence, num_tokens, (0,)),))


class Watched:
    """A watch whose steps last as long as a test says, and beat as the process runs."""

    def __init__(self) -> None:
        self.watch = StepWatch()
        self.now_s = 0.0

    def begin(self, batch: Batch) -> None:
        self.watch.begin(self.now_s)
        self.watch.launched(batch)

    def beats(self, seconds: float) -> str | None:
        """Passes time until the watch gives up, or `seconds`."""
        for _ in range(int(seconds / HEARTBEAT_S)):
            self.now_s += HEARTBEAT_S
            if (why := self.watch.beat()) is not None:
                return why
        return None

    def step(self, batch: Batch, seconds: float) -> None:
        self.begin(batch)
        assert self.beats(seconds) is None
        self.now_s += seconds % HEARTBEAT_S
        self.watch.end(self.now_s)


def test_a_step_that_takes_far_longer_than_its_kind_ever_did_hangs() -> None:
    watched = Watched()
    watched.step(prompt(100), 3.0)
    watched.begin(prompt(100))
    assert watched.beats(3.0 * FACTOR) is None
    assert watched.beats(HEARTBEAT_S) == "a step has taken 60 s, none like it took over 3.00 s"


def test_a_short_step_has_some_time_whatever_its_kind_took() -> None:
    watched = Watched()
    watched.step(prompt(100), 0.01)
    watched.begin(prompt(100))
    assert watched.beats(LEAST_S) is None
    assert watched.beats(HEARTBEAT_S) is not None


def test_a_first_step_of_a_kind_may_compile() -> None:
    watched = Watched()
    watched.step(prompt(100), 0.01)
    assert kind_of(prompt(1000)) != kind_of(prompt(100))
    watched.begin(prompt(1000))
    assert watched.beats(FIRST_S) is None
    assert watched.beats(HEARTBEAT_S) is not None


def test_a_process_that_is_suspended_neither_hangs_nor_learns_patience() -> None:
    watched = Watched()
    watched.step(prompt(100), 0.01)
    watched.begin(prompt(100))
    watched.now_s += 3600.0
    assert watched.beats(1.0) is None
    watched.watch.end(watched.now_s)
    watched.begin(prompt(100))
    assert watched.beats(1.5 * FACTOR) is None
    assert watched.beats(HEARTBEAT_S) is not None


def test_nothing_hangs_between_steps() -> None:
    watched = Watched()
    watched.step(prompt(100), 0.01)
    assert watched.beats(2 * FIRST_S) is None
