"""Decides whether the engine thread hangs: a step that takes far longer than its kind ever did.

    engine thread:  begin -> launched(batch)* -> end
    heartbeat:      beat, beat, ... -> why the worker is given up

Time is counted in beats of the process itself: while it is suspended, none pass, and on a loaded machine they
pass more slowly. Pure: both the process and the simulator call it."""

from collections.abc import Callable
from dataclasses import dataclass

from ..core.messages import HEARTBEAT_S
from ..engine.batch import Batch, Launched, StepRunner

Kind = tuple[int, int, int, int]

FACTOR = 20.0  # times as long as any before it of its kind
LEAST_S = 20.0
FIRST_S = 600.0  # a first one of its kind: it may compile, and nothing is known of its duration
FIRST_ON_GPU_S = 120.0


def kind_of(batch: Batch) -> Kind:
    """Returns the batch's size, to powers of two, or of four for what grows with the square."""
    shape = batch.timing(0.0)
    return (
        shape.num_prefill_tokens.bit_length(),
        shape.sum_prefill_squares.bit_length() // 2,
        shape.num_decode_sequences.bit_length(),
        shape.num_context_tokens.bit_length() // 2,
    )


@dataclass(slots=True)
class _Step:
    started_s: float
    kinds: tuple[Kind, ...] = ()  # of the batches that it launched
    num_beats: int = 0


class StepWatch:
    """The engine thread calls all but `beat`; neither waits for the other."""

    def __init__(self, first_s: float = FIRST_S, least_s: float = LEAST_S) -> None:
        self._first_s = first_s
        self._least_s = least_s
        self._longest_s: dict[tuple[Kind, ...], float] = {}
        self._step: _Step | None = None

    def begin(self, now_s: float) -> None:
        self._step = _Step(now_s)

    def launched(self, batch: Batch) -> None:
        """The step computes this batch."""
        assert self._step is not None, "a batch is launched within a step"
        self._step.kinds += (kind_of(batch),)

    def end(self, now_s: float) -> None:
        """Records the step's duration, less the time for which the process was suspended."""
        step, self._step = self._step, None
        assert step is not None
        duration_s = min(now_s - step.started_s, (step.num_beats + 1) * HEARTBEAT_S)
        self._longest_s[step.kinds] = max(duration_s, self._longest_s.get(step.kinds, 0.0))

    def beat(self) -> str | None:
        """Called every `HEARTBEAT_S`; returns why the step under way will never end, if so."""
        step = self._step
        if step is None:
            return None
        step.num_beats += 1
        longest_s = self._longest_s.get(step.kinds)
        limit_s = self._first_s if longest_s is None else max(self._least_s, FACTOR * longest_s)
        if step.num_beats * HEARTBEAT_S <= limit_s:
            return None
        before = "the first of its kind" if longest_s is None else f"none like it took over {longest_s:.2f} s"
        return f"a step has taken {limit_s:.0f} s, {before}"


class WatchedRunner:
    """A `StepRunner` that tells the watch what it launches."""

    def __init__(self, runner: StepRunner, watch: StepWatch) -> None:
        self.runs_ahead = runner.runs_ahead
        self._runner = runner
        self._watch = watch

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> Launched:
        self._watch.launched(batch)
        return self._runner.launch(batch, on_layer, before_sampling)
