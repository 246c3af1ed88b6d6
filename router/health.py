"""Ejects workers that fail one dispatch after another: one that fails fast is always idle, and would attract
the traffic. Outlier detection as in Envoy (consecutive failures, ejection times that grow, a bound on the
ejected share), with a slow start after it.

    healthy --3 failures in a row--> ejected --its time is over--> trial --every dispatch works--> healthy
                                        ^                            |
                                        +-------- one failure -------+
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .registered_worker import RegisteredWorker, RoutingState
from .registry import Registry

NUM_FAILURES = 3  # consecutive; fewer may be the other worker's, or the link's
EJECTION_S = 10.0  # the first time; doubles with each ejection that no healthy time has ended
MAX_EJECTION_S = 300.0
FULL_TRIAL = 16  # dispatches at once that a trial worker has carried before it counts as healthy


@dataclass(slots=True)
class _Record:
    """A worker that has failed and not recovered since."""

    worker: RegisteredWorker
    failures: list[RegisteredWorker | None] = field(default_factory=list)  # in a row: the other end's, if any
    since_s: float = 0.0  # outcomes of dispatches from before say nothing new
    num_ejections: int = 0
    readmitted_s: float | None = None  # when its ejection ends; None: it is not ejected
    problem: str = ""


class Health:
    """Which workers are ejected, or on trial after it. Workers without a record are healthy.

    A worker is ejected only while another of each of its roles serves that can hold as much and whose last
    dispatch worked: where all fail alike, the cause is elsewhere. At least half of a role's workers stay."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._records: dict[str, _Record] = {}  # by worker id

    def failed(
        self,
        worker: RegisteredWorker,
        error: str,
        dispatched_s: float,
        now_s: float,
        other: RegisteredWorker | None = None,
    ) -> None:
        """Records a failed dispatch for which the worker may be to blame, or the `other` end of its transfer.
        What was dispatched before an earlier failure may have failed of the same cause, and does not
        count."""
        record = self._records.setdefault(worker.worker_id, _Record(worker))
        if dispatched_s < record.since_s:
            return
        record.failures.append(other)
        record.since_s = now_s
        is_suspect = worker.trial_limit is not None or len(record.failures) >= NUM_FAILURES
        if is_suspect and worker.state is RoutingState.READY and self._can_spare(worker):
            seconds = min(EJECTION_S * 2.0 ** min(record.num_ejections, 16), MAX_EJECTION_S)
            record.num_ejections += 1
            record.readmitted_s = now_s + seconds
            record.problem = (
                f"{worker.worker_id} gets no requests for {seconds:.0f} s: {len(record.failures)} in a row"
                f" have failed there, the last with: {error}"
            )
            self._registry.eject(worker)

    def worked(self, worker: RegisteredWorker, dispatched_s: float) -> None:
        """Records a dispatch that worked. A worker on trial may then have twice as many at once."""
        record = self._records.get(worker.worker_id)
        if record is None or dispatched_s < record.since_s or worker.state is RoutingState.EJECTED:
            return
        record.failures.clear()
        limit = worker.trial_limit
        if limit is not None and limit < FULL_TRIAL:
            self._registry.limit(worker, 2 * limit)
        else:
            self._forget(record)

    def lost(self, worker: RegisteredWorker) -> None:
        """Transfers with a lost worker failed since it was dying: the others' part in that is forgiven."""
        self._records.pop(worker.worker_id, None)
        for record in list(self._records.values()):
            num_before = len(record.failures)
            record.failures = [other for other in record.failures if other is not worker]
            if len(record.failures) < num_before and len(record.failures) < NUM_FAILURES:
                if record.worker.state is RoutingState.EJECTED:
                    self._registry.readmit(record.worker)
                self._forget(record)

    def review(self, now_s: float) -> None:
        """Readmits workers whose time is over, and those that the others can no longer spare."""
        for record in self._ejected():
            assert record.readmitted_s is not None
            if now_s >= record.readmitted_s or not self._can_spare(record.worker):
                self._registry.readmit(record.worker)
                self._registry.limit(record.worker, 1)
                record.readmitted_s, record.since_s = None, now_s

    def next_s(self) -> float | None:
        """Returns when the next ejection ends."""
        return min((record.readmitted_s or 0.0 for record in self._ejected()), default=None)

    def problems(self) -> Iterator[str]:
        """Describes the ejected workers."""
        return (record.problem for record in self._ejected())

    def _ejected(self) -> list[_Record]:
        return [record for record in self._records.values() if record.worker.state is RoutingState.EJECTED]

    def _forget(self, record: _Record) -> None:
        self._registry.limit(record.worker, None)
        del self._records[record.worker.worker_id]

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
        serving = [other for other in others if other.takes_work]
        num_ejected = sum(other.state is RoutingState.EJECTED for other in others)
        return len(serving) > num_ejected and any(
            other.worker_id not in self._records or not self._records[other.worker_id].failures
            for other in serving
        )


def _prefills(worker: RegisteredWorker) -> bool:
    return worker.role.prefills


def _decodes(worker: RegisteredWorker) -> bool:
    return worker.role.decodes
