"""Ejects workers that fail one dispatch after another: one that fails fast is always idle, and would attract
the traffic. Outlier detection as in Envoy (consecutive failures, ejection times that grow, a bound on the
ejected share), with a slow start after it.

    healthy --3 failures in a row--> ejected --its time is over--> trial --every dispatch works--> healthy
                                        ^                            |
                                        +-------- one failure -------+
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .registry import RegisteredWorker, Registry, RoutingState

NUM_FAILURES = 3  # consecutive; fewer may be the other worker's, or the link's
EJECTION_S = 10.0  # the first time; doubles with each ejection that no healthy time has ended
MAX_EJECTION_S = 300.0
FULL_TRIAL = 16  # dispatches at once that a trial worker has carried before it counts as healthy


@dataclass(slots=True)
class _Record:
    """A worker that has failed and not recovered since."""

    worker: RegisteredWorker
    num_failures: int = 0  # consecutive
    num_ejections: int = 0
    readmitted_s: float | None = None  # when its ejection ends; None: it is not ejected
    problem: str = ""


class Health:
    """Which workers are ejected, or on trial after it. Workers without a record are healthy.

    A worker is ejected only while another of each of its roles serves that can hold as much and whose last
    dispatch worked: where all fail alike, the cause is elsewhere. More than half of a role's workers stay."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._records: dict[str, _Record] = {}  # by worker id

    def failed(self, worker: RegisteredWorker, error: str, now_s: float) -> None:
        """Records a failed dispatch for which the worker may be to blame."""
        record = self._records.setdefault(worker.worker_id, _Record(worker))
        record.num_failures += 1
        is_on_trial = worker.trial_limit is not None
        if worker.state is not RoutingState.READY or not (is_on_trial or record.num_failures >= NUM_FAILURES):
            return
        if self._can_spare(worker):
            seconds = min(EJECTION_S * 2.0 ** min(record.num_ejections, 16), MAX_EJECTION_S)
            record.num_ejections += 1
            record.readmitted_s = now_s + seconds
            record.problem = (
                f"{worker.worker_id} gets no requests for {seconds:.0f} s: {record.num_failures} in a row"
                f" have failed there, the last with: {error}"
            )
            self._registry.eject(worker)

    def worked(self, worker: RegisteredWorker) -> None:
        """Records a dispatch that worked. A worker on trial may then have twice as many at once."""
        record = self._records.get(worker.worker_id)
        if record is None or worker.state is RoutingState.EJECTED:  # in which a late success proves little
            return
        record.num_failures = 0
        limit = worker.trial_limit
        if limit is not None and limit < FULL_TRIAL:
            self._registry.limit(worker, 2 * limit)
            return
        self._registry.limit(worker, None)
        del self._records[worker.worker_id]

    def lost(self, worker: RegisteredWorker) -> None:
        self._records.pop(worker.worker_id, None)

    def review(self, now_s: float) -> None:
        """Readmits workers whose time is over, and those that the others can no longer spare."""
        for record in self._ejected():
            assert record.readmitted_s is not None
            if now_s >= record.readmitted_s or not self._can_spare(record.worker):
                record.readmitted_s = None
                if record.worker.state is RoutingState.EJECTED:
                    self._registry.readmit(record.worker)
                    self._registry.limit(record.worker, 1)

    def next_s(self) -> float | None:
        """Returns when the next ejection ends."""
        ends = (record.readmitted_s for record in self._records.values())
        return min((end_s for end_s in ends if end_s is not None), default=None)

    def problems(self) -> Iterator[str]:
        """Describes the ejected workers."""
        return (record.problem for record in self._ejected())

    def _ejected(self) -> list[_Record]:
        return [record for record in self._records.values() if record.readmitted_s is not None]

    def _can_spare(self, worker: RegisteredWorker) -> bool:
        others = [
            other
            for other in self._registry
            if other is not worker and other.capacity_tokens >= worker.capacity_tokens
        ]
        return all(
            self._role_can_spare([other for other in others if serves(other)])
            for serves in (_prefills, _decodes)
            if serves(worker)
        )

    def _role_can_spare(self, others: list[RegisteredWorker]) -> bool:
        serving = [other for other in others if other.state is RoutingState.READY]
        num_ejected = sum(other.state is RoutingState.EJECTED for other in others)
        return len(serving) > num_ejected and any(
            other.worker_id not in self._records or not self._records[other.worker_id].num_failures
            for other in serving
        )


def _prefills(worker: RegisteredWorker) -> bool:
    return worker.role.prefills


def _decodes(worker: RegisteredWorker) -> bool:
    return worker.role.decodes
