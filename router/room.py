"""Makes room for clients that run little where others run much: decides which client may take it, and from
which. Pure; changes no state.

Turns in the queue share capacity that becomes free. They do not help a client that arrives when another holds
all places with long streams: then one of those is taken back. It continues in its client's turn, with the
same tokens."""

from collections.abc import Iterable, Iterator

from ..core.sharing import LITTLE
from .fair_queue import TokenCounters
from .ledger import Ledger
from .live_request import Dispatch, DispatchState, Job
from .registered_worker import RegisteredWorker
from .registry import Registry

MAX_DISPLACED = 3  # times that a request gives up its place for one of higher priority


class RoomMaker:
    """Consulted when the head of the queue has to wait. A client takes room only if it has had fewer tokens.
    The client that gives up room still runs at least as much as the one that takes it, so that no two clients
    take it from each other in turn, and none is left with nothing."""

    def __init__(self, registry: Registry, ledger: Ledger, counters: TokenCounters) -> None:
        self._registry = registry
        self._ledger = ledger
        self._counters = counters

    def waits_for_decode(self, job: Job) -> bool:
        """Whether no worker has a place for the job's sequences; otherwise it waits for others' prompts,
        which end soon."""
        return job.needs_decode and not self._registry.has_decode_room(
            job.num_tokens, job.num_total_tokens, len(job.choices), job.num_expected_tokens
        )

    def may_take(self, job: Job) -> bool:
        """Whether the job's client runs so little that the client that runs most makes room for it, or
        something of lower priority does."""
        return self._giver(job) is not None or self._lower(job) is not None

    def _lower(self, job: Job) -> Dispatch | None:
        """Returns the dispatch below the job's priority that makes room already, or is to: of the lowest
        priority, the youngest of the client that runs most."""
        legs = self._ledger.decoding.below(job.priority, self._ledger.by_running)
        return next((dispatch for dispatch in legs if self._gives_way(dispatch, job)), None)

    def _gives_way(self, dispatch: Dispatch, job: Job) -> bool:
        """Whether a dispatch of lower priority has a place that the job could take, and may lose it."""
        return (
            dispatch.state is not DispatchState.FINISHED
            and dispatch.live.num_times_displaced < MAX_DISPLACED
            and not dispatch.live.keeps_place
            and self._could_hold(dispatch, job)
        )

    def level(self, head: Job, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yields waiting jobs of other clients that have had no more than the head's client: these may pass
        the head while it waits for others' prompts. They have had more then, and wait for the head."""
        num_had = self._counters.of(head.client)
        for job in jobs:
            is_level = self._counters.of(job.client) <= num_had and job.priority <= head.priority
            if is_level and job.client != head.client:
                yield job

    def newcomer(self, head: Job, jobs: Iterable[Job]) -> Job | None:
        """Returns the first waiting job for which room is made and that may pass the head: its client then
        runs no more than the head's does, and its priority is not lower."""
        num_running = self._ledger.num_running
        if not num_running[head.client]:
            return None
        for job in jobs:
            num_then = num_running[job.client] + len(job.choices)
            if job.priority > head.priority:
                continue
            if job.client != head.client and num_then <= num_running[head.client] and self.may_take(job):
                return job
        return None

    def victim(self, job: Job) -> Dispatch | None:
        """Returns the dispatch whose place the job takes; None when no client can give one up, or one is
        already doing so.

        It is one of lower priority, or the youngest on the least loaded worker, which has the least to
        recompute.
        """
        lower = self._lower(job)
        if lower is not None:
            return None if lower.state is DispatchState.FAILED else lower
        for dispatch, _ in self._given(job):
            if self._ledger.num_running[dispatch.spec.client] - dispatch.num_booked >= self._num_then(job):
                return dispatch
        return None

    def host(self, job: Job) -> RegisteredWorker | None:
        """Returns a worker to place the job at, though it has no room: its scheduler preempts choices of a
        request that is all its client runs, and has to be left some. None while a dispatch can give up its
        place instead. The request then keeps at least what the job and those on their way there need."""
        if self._lower(job) is not None or self.victim(job) is not None:
            return None
        for dispatch, worker in self._given(job):
            num_blocks = dispatch.num_reserved_blocks
            num_blocks += dispatch.num_grown_tokens // worker.info.layout.block_size
            num_needed = worker.num_pending_blocks + worker.blocks_for(job.num_tokens, len(job.choices))
            is_large = dispatch.num_booked > len(job.choices) and num_blocks >= 2 * num_needed
            if dispatch.decode_started and is_large and worker.is_within_trial:
                return worker
        return None

    def _given(self, job: Job) -> Iterator[tuple[Dispatch, RegisteredWorker]]:
        """Yields what the giver runs where the job could, with the workers, the youngest on the least loaded
        one first; nothing while a place that it has given up is not free yet."""
        giver = self._giver(job)
        legs = self._ledger.decoding
        if giver is None or any(self._could_hold(dispatch, job) for dispatch in legs.failed_of(giver)):
            return
        given = legs.of_client(giver)
        for worker in self._registry.least_loaded(given.keys(), job.num_total_tokens):
            for dispatch in reversed(given[worker]):
                if dispatch.state is DispatchState.RUNNING:
                    yield dispatch, worker

    def _could_hold(self, dispatch: Dispatch, job: Job) -> bool:
        """Whether the job could take the place of a dispatch that decodes."""
        assert dispatch.decode is not None
        return self._registry.is_able_to_decode(dispatch.decode, job.num_total_tokens)

    def _num_then(self, job: Job) -> int:
        return self._ledger.num_running[job.client] + len(job.choices)

    def _giver(self, job: Job) -> str | None:
        """Returns the client that runs most, if it is to give up some of that for the job."""
        num_running = self._ledger.num_running
        giver = next(self._ledger.by_running(), None)
        if giver is None or giver == job.client:
            return None
        if self._counters.of(job.client) > self._counters.of(giver):  # it has had more, only not lately
            return None
        num_then = self._num_then(job)
        is_little = not num_running[job.client] or num_then * LITTLE <= num_running[giver]
        return giver if is_little and num_then < num_running[giver] else None
