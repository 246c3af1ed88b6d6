"""The registry of current workers: which of them get work, and their ranking for the next request."""

from collections.abc import Collection, Hashable, Iterable, Iterator
from heapq import merge, nsmallest
from itertools import islice

import msgspec

from ..core.messages import Role, WorkerInfo
from .ranking import Ranking
from .registered_worker import RegisteredWorker, RoutingState, decode_load

# in the order of the rankings a slow worker comes behind faster ones that have somewhat more to do
PROMPT_S = 0.1  # counted for a prompt, whatever its length
LAST = 1e9  # in the order of the rankings: just now it cannot be one of a pair
IDLE_LOAD = 0.1  # counted beside the load, as a step takes time even for one sequence
FEW = 16  # workers: fewer are sorted, of more only those at the head of the ranking are looked at
NUM_WITH_ROOM = 32  # workers with the most room, of which the least loaded are considered


class Registry:
    """Current incarnations by name, and their rankings: by queued prefill and by decode load, each for
    capacities of the same power of two, and by the room to decode; in view of
    the workers' speeds."""

    def __init__(self) -> None:
        self._workers: dict[str, RegisteredWorker] = {}
        self._fenced: dict[str, int] = {}  # the highest incarnation of each id that is known to be lost
        self._layouts: dict[Hashable, int] = {}
        self._by_prefill: dict[int, Ranking[RegisteredWorker]] = {}  # by the bit length of the capacity
        self._by_decode: dict[int, Ranking[RegisteredWorker]] = {}
        self._by_room: Ranking[RegisteredWorker] = Ranking()  # decode workers, the one with most room first
        self._unranked: dict[RegisteredWorker, None] = {}  # whose room has changed since it was ranked
        self._roomier: dict[RegisteredWorker, None] = {}  # since `take_roomier`
        self._apart: dict[str, RegisteredWorker] = {}
        self.num_expected = 0  # workers that start, and will be ready

    def __iter__(self) -> Iterator[RegisteredWorker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> RegisteredWorker | None:
        return self._workers.get(worker_id)

    def current(self, worker_id: str, incarnation: int) -> RegisteredWorker | None:
        """Returns the worker if this incarnation is the current one; None for a lost one."""
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.info.incarnation == incarnation else None

    def is_news(self, info: WorkerInfo) -> bool:
        """Whether this incarnation is neither known nor lost."""
        known = self._workers.get(info.worker_id)
        return info.incarnation > max(
            self._fenced.get(info.worker_id, -1), known.incarnation if known else -1
        )

    def add(self, info: WorkerInfo, num_cached_blocks: int = 0) -> RegisteredWorker:
        layout = info.layout
        key = (
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
            layout.dtype,
            layout.model_fingerprint,
        )
        worker = RegisteredWorker(info, self._layouts.setdefault(key, len(self._layouts)))
        worker.load = msgspec.structs.replace(worker.load, num_unreported_blocks=num_cached_blocks)
        self._workers[info.worker_id] = worker
        self.rank(worker)
        return worker

    def lose(self, worker: RegisteredWorker) -> None:
        worker.transition(RoutingState.LOST)
        self._apart.pop(worker.worker_id, None)
        self._unrank(worker)
        del self._workers[worker.worker_id]
        self._fenced[worker.worker_id] = worker.incarnation

    def drain(self, worker: RegisteredWorker) -> None:
        worker.transition(RoutingState.DRAINING)
        self._apart.pop(worker.worker_id, None)
        self._unrank(worker)

    def eject(self, worker: RegisteredWorker) -> None:
        worker.transition(RoutingState.EJECTED)
        self._unrank(worker)

    def set_apart(self, worker: RegisteredWorker) -> None:
        worker.transition(RoutingState.APART)
        self._apart[worker.worker_id] = worker
        self._unrank(worker)

    @property
    def has_apart(self) -> bool:
        return bool(self._apart)

    def apart(self) -> list[RegisteredWorker]:
        """Returns the workers that are set apart, in the order in which they were."""
        return list(self._apart.values())

    def readmit(self, worker: RegisteredWorker) -> None:
        worker.transition(RoutingState.READY)
        self._apart.pop(worker.worker_id, None)
        self.rank(worker)

    def disconnect(self, worker: RegisteredWorker) -> None:
        """The worker is away: its legs stay open, and it gets no others."""
        worker.is_away = True
        self._unrank(worker)

    def reconnect(self, worker: RegisteredWorker, num_cached_blocks: int) -> None:
        worker.is_away = False
        worker.load = msgspec.structs.replace(worker.load, num_unreported_blocks=num_cached_blocks)
        self.rank(worker)

    @property
    def num_away(self) -> int:
        return sum(worker.is_away for worker in self)

    @property
    def is_worker_expected(self) -> bool:
        """Whether requests may wait for workers to come, or to come back."""
        return bool(self.num_expected or self.num_away)

    def limit(self, worker: RegisteredWorker, num_dispatches: int | None) -> None:
        """Bounds the dispatches that may be open at the worker at once; None lifts the bound."""
        worker.trial_limit = num_dispatches
        self.note_room(worker)

    def hold(self, worker: RegisteredWorker, num_blocks: int, num_sequences: int) -> None:
        """Keeps room at the worker from other jobs."""
        worker.num_held_blocks, worker.num_held_sequences = num_blocks, num_sequences

    def with_decode_room(
        self, job_tokens: int, total_tokens: int, num_choices: int, num_expected_tokens: int, count: int
    ) -> list[RegisteredWorker]:
        """Returns `count` of the ready decode workers that have room for `job_tokens` now and can hold
        `total_tokens`: the least loaded of those with the most room."""
        found = islice(
            self._with_decode_room(job_tokens, total_tokens, num_choices, num_expected_tokens), NUM_WITH_ROOM
        )
        return nsmallest(
            count, found, key=lambda worker: (worker.num_sending > 0, decode_load(worker), worker.worker_id)
        )

    def has_decode_room(
        self, job_tokens: int, total_tokens: int, num_choices: int, num_expected_tokens: int = 0
    ) -> bool:
        """Whether one of those `able_to_decode` has room for `job_tokens` now."""
        if self.best_decode(total_tokens, 1):
            return any(self._with_decode_room(job_tokens, total_tokens, num_choices, num_expected_tokens))
        return any(
            worker.has_decode_room(job_tokens, num_choices, num_expected_tokens)
            for worker in self.able_to_decode(total_tokens)
        )

    def _with_decode_room(
        self, job_tokens: int, total_tokens: int, num_choices: int, num_expected_tokens: int
    ) -> Iterator[RegisteredWorker]:
        for worker in self._unranked:
            if worker.takes_work and worker.role.decodes:
                self._by_room.put(worker.worker_id, -worker.room_tokens, worker)
        self._unranked.clear()
        for worker in self._by_room:
            if worker.room_tokens < job_tokens:
                return
            if worker.capacity_tokens >= total_tokens and worker.has_decode_room(
                job_tokens, num_choices, num_expected_tokens
            ):
                yield worker

    def note_room(self, worker: RegisteredWorker, *, is_more: bool = True) -> None:
        """Records that the room at a worker has changed; `is_more`: there may be more of it."""
        self._unranked[worker] = None
        if is_more:
            self._roomier[worker] = None

    def take_roomier(self) -> Iterable[RegisteredWorker]:
        """Returns the workers that may have more room than when this was last called."""
        roomier, self._roomier = self._roomier, {}
        return roomier

    def assign(self, worker: RegisteredWorker, role: Role) -> None:
        """Makes the worker ready, as `role`."""
        if worker.state is RoutingState.DRAINING:
            worker.transition(RoutingState.READY)
        self._unrank(worker)
        worker.role = role
        self.rank(worker)

    def rank(self, worker: RegisteredWorker) -> None:
        """Updates the worker's rank from its present account."""
        if not worker.takes_work:
            return
        self.note_room(worker)
        size = worker.capacity_tokens.bit_length()
        if worker.role.prefills:
            ranking = self._by_prefill.setdefault(size, Ranking())
            key = worker.queued_prefill_s + PROMPT_S * worker.speed.prefill_factor
            key += 0.0 if worker.may_send else LAST
            ranking.put(worker.worker_id, key, worker)
        if worker.role.decodes:
            ranking = self._by_decode.setdefault(size, Ranking())
            ranking.put(worker.worker_id, _decode_key(worker), worker)

    def _unrank(self, worker: RegisteredWorker) -> None:
        self._by_room.discard(worker.worker_id)
        self._unranked.pop(worker, None)
        for rankings in (self._by_prefill, self._by_decode):
            if ranking := rankings.get(worker.capacity_tokens.bit_length()):
                ranking.discard(worker.worker_id)

    def best_prefill(self, num_tokens: int, count: int) -> list[RegisteredWorker]:
        """Returns the ready prefill workers with the shortest queues that can hold `num_tokens`: `count` of
        each power of two."""
        return _best(self._by_prefill, num_tokens, count)

    def best_decode(self, num_tokens: int, count: int) -> list[RegisteredWorker]:
        """Returns the least loaded ready decode workers that can hold `num_tokens`: `count` of each
        power of two."""
        return _best(self._by_decode, num_tokens, count)

    def able_to_decode(self, num_tokens: int) -> list[RegisteredWorker]:
        """Returns the ready workers that could decode a job of `num_tokens`. Without decode workers, prefill
        workers serve both phases, as in `Placer.place`."""
        able = [worker for worker in self if worker.takes_work and worker.capacity_tokens >= num_tokens]
        return [worker for worker in able if worker.role.decodes] or able

    def least_loaded(
        self, workers: Collection[RegisteredWorker], num_tokens: int
    ) -> Iterator[RegisteredWorker]:
        """Yields those of `workers` that are `able_to_decode`, the least loaded first."""
        if len(workers) > FEW and self.best_decode(num_tokens, 1):
            able = (ranking for size, ranking in self._by_decode.items() if size >= num_tokens.bit_length())
            for worker in merge(*able, key=_decode_key):
                if worker in workers and worker.capacity_tokens >= num_tokens:
                    yield worker
            return
        yield from sorted(
            (worker for worker in workers if self.is_able_to_decode(worker, num_tokens)),
            key=lambda worker: (_decode_key(worker), worker.worker_id),
        )

    def is_able_to_decode(self, worker: RegisteredWorker, num_tokens: int) -> bool:
        """Whether the worker is one of those `able_to_decode`."""
        return (
            worker.takes_work
            and worker.capacity_tokens >= num_tokens
            and (worker.role.decodes or not self.best_decode(num_tokens, 1))
        )

    def can_hold(self, num_tokens: int) -> bool:
        """Whether any ready worker, or one that is set apart for a while, could ever serve that many
        tokens."""
        return bool(
            self.best_decode(num_tokens, 1)
            or self.best_prefill(num_tokens, 1)
            or any(worker.capacity_tokens >= num_tokens for worker in self._apart.values())
        )

    def num_ready(self, *, prefills: bool) -> int:
        rankings = self._by_prefill if prefills else self._by_decode
        return sum(len(ranking) for ranking in rankings.values())


def _decode_key(worker: RegisteredWorker) -> float:
    """Returns the worker's place in the order of decode load, in view of its speed."""
    key = (decode_load(worker) + IDLE_LOAD) * worker.speed.decode_weight
    return key if worker.may_receive else key + LAST


def _best(
    rankings: dict[int, Ranking[RegisteredWorker]], num_tokens: int, count: int
) -> list[RegisteredWorker]:
    best: list[RegisteredWorker] = []
    for size, ranking in rankings.items():
        if size > num_tokens.bit_length():
            best += ranking.best(count)
        elif size == num_tokens.bit_length():
            best += islice((worker for worker in ranking if worker.capacity_tokens >= num_tokens), count)
    return best
