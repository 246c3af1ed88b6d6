"""Pairs of workers between which transfers fail, though each may work with others: a mount that one of them
lacks, a port that a rule closes to the other. Ejecting either would lose a sound worker.

    --2 failures in a row--> avoided --its time is over--> trial --it works--> forgotten
                                ^                            |
                                +--------- dispatch ---------+

An avoided pair is chosen last, as one of hosts is that do not reach each other (`links`)."""

from dataclasses import dataclass

from .registered_worker import RegisteredWorker

NUM_FAILURES = 2  # consecutive; a single one may be a worker that died
AVOIDED_S = 10.0  # the first time; doubles with each further failure
MAX_AVOIDED_S = 300.0

Pair = tuple[RegisteredWorker, RegisteredWorker]  # prefill, decode


@dataclass(slots=True)
class _Record:
    num_failures: int = 0  # consecutive
    failed_s: float = 0.0  # what was dispatched before may have failed of the same cause
    avoided_until_s: float = 0.0


class Pairs:
    """A circuit breaker for each pair whose last transfer failed. Pure."""

    def __init__(self) -> None:
        self._records: dict[Pair, _Record] = {}
        self._avoided: set[Pair] = set()

    def avoids(self, prefill: RegisteredWorker, decode: RegisteredWorker) -> bool:
        return bool(self._avoided) and (prefill, decode) in self._avoided

    def started(self, prefill: RegisteredWorker, decode: RegisteredWorker, now_s: float) -> None:
        """Records a dispatch: no other one tries a pair that has failed until the outcome of this one is
        known."""
        if (record := self._records.get((prefill, decode))) is not None:
            self._avoid((prefill, decode), record, now_s)

    def worked(self, prefill: RegisteredWorker, decode: RegisteredWorker) -> None:
        self._records.pop((prefill, decode), None)
        self._avoided.discard((prefill, decode))

    def failed(
        self, prefill: RegisteredWorker, decode: RegisteredWorker, dispatched_s: float, now_s: float
    ) -> None:
        record = self._records.setdefault((prefill, decode), _Record())
        if dispatched_s < record.failed_s:
            return
        record.num_failures += 1
        record.failed_s = now_s
        self._avoid((prefill, decode), record, now_s)

    def lost(self, worker: RegisteredWorker) -> None:
        """Forgets the pairs of a lost worker."""
        if self._records:
            self._records = {pair: record for pair, record in self._records.items() if worker not in pair}
            self._avoided &= self._records.keys()

    def review(self, now_s: float) -> None:
        """Lets pairs be tried whose time is over."""
        if self._avoided:
            self._avoided = {pair for pair in self._avoided if now_s < self._records[pair].avoided_until_s}

    def _avoid(self, pair: Pair, record: _Record, now_s: float) -> None:
        if record.num_failures < NUM_FAILURES:
            return
        seconds = min(AVOIDED_S * 2.0 ** min(record.num_failures - NUM_FAILURES, 16), MAX_AVOIDED_S)
        record.avoided_until_s = now_s + seconds
        self._avoided.add(pair)
