"""The registry of current workers: their unfinished work, and their ranking for the next request."""

import enum
from collections.abc import Hashable, Iterable, Iterator
from heapq import nsmallest
from itertools import islice
from math import inf

import msgspec

from ..core.automaton import Automaton
from ..core.messages import Role, WorkerInfo, WorkerLoad
from ..core.request import TransferId
from ..core.worker_speed import WorkerSpeed
from .ranking import Ranking

# in the order of the rankings a slow worker comes behind faster ones that have somewhat more to do
PROMPT_S = 0.1  # counted for a prompt, whatever its length
# a part of the expected growth of a worker's sequences, as others end meanwhile: more where some have been
# preempted
GROWTH_SHARE = 0.1
GROWTH_STEP = 0.1
LAST = 1e9  # in the order of the rankings: just now it cannot be one of a pair
IDLE_LOAD = 0.1  # counted beside the load, as a step takes time even for one sequence
NUM_WITH_ROOM = 32  # workers with the most room, of which the least loaded are considered


class RoutingState(enum.Enum):
    """A worker as the router sees it."""

    READY = "ready"
    EJECTED = "ejected"  # it failed too often: no new dispatch for a while
    APART = "apart"  # for a request alone under which another worker died; no other dispatch
    DRAINING = "draining"  # no new dispatch; streams finish
    LOST = "lost"


TRANSITIONS = {
    RoutingState.READY: {
        RoutingState.EJECTED,
        RoutingState.APART,
        RoutingState.DRAINING,
        RoutingState.LOST,
    },
    RoutingState.APART: {RoutingState.READY, RoutingState.DRAINING, RoutingState.LOST},
    RoutingState.EJECTED: {RoutingState.READY, RoutingState.DRAINING, RoutingState.LOST},
    RoutingState.DRAINING: {RoutingState.READY, RoutingState.LOST},
    RoutingState.LOST: set[RoutingState](),
}


class RegisteredWorker(Automaton[RoutingState]):
    """One incarnation of a worker, with the account of what is open there. The router's own account leads the
    reported load: it includes work that is on its way."""

    __slots__ = (
        "_progress_s",
        "_stepped_s",
        "_window_start_s",
        "_window_tokens",
        "capacity_tokens",
        "growth_share",
        "info",
        "is_away",
        "layout",
        "load",
        "num_cached_tokens",
        "num_context_tokens",
        "num_expected_tokens",
        "num_grown_tokens",
        "num_held_blocks",
        "num_held_sequences",
        "num_pending_blocks",
        "num_prefilling",
        "num_prompt_tokens",
        "num_queued_tokens",
        "num_reserved_blocks",
        "num_sending",
        "num_sequences",
        "num_short_tokens",
        "open_legs",
        "queued_prefill_s",
        "reported_s",
        "role",
        "speed",
        "tokens_per_s",
        "trial_limit",
        "worker_id",
    )

    def __init__(self, info: WorkerInfo, layout: int) -> None:
        super().__init__(TRANSITIONS, RoutingState.READY)
        self.info = info
        self.worker_id = info.worker_id
        self.role = info.role
        self.layout = layout  # equal for workers that can exchange KV
        self.capacity_tokens = min(info.max_model_len, info.num_blocks * info.layout.block_size)
        self.load = WorkerLoad(num_free_blocks=info.num_blocks)
        self.speed = WorkerSpeed()
        self.reported_s = inf  # when it last did
        self._stepped_s: float | None = None  # when a step last ended, or there was nothing to do
        self.is_away = False  # it goes on with its legs without a connection, and is expected back
        self.open_legs: dict[TransferId, None] = {}  # ordered, so that a loss is handled in order of dispatch
        self.num_prefilling = 0  # dispatches that have not brought their first token
        self.num_queued_tokens = 0  # uncached prompt tokens of those
        self.num_short_tokens = 0  # of those: of short prompts
        self.queued_prefill_s = 0.0  # predicted compute of those
        self._progress_s = 0.0  # the part of that which is already computed
        self.num_sending = 0  # open prefill legs whose KV goes to another worker
        self.num_sequences = 0  # choices of open decode legs that have not ended
        self.num_context_tokens = 0  # of those, prompt and output
        self.num_reserved_blocks = 0  # that those took at dispatch
        self.num_grown_tokens = 0  # that they have produced since
        self.num_expected_tokens = 0  # that they are still expected to produce
        self.growth_share = GROWTH_SHARE
        # reserved by legs that have not begun to decode: reports may not include them yet
        self.num_pending_blocks = 0
        self.num_held_blocks = 0  # for a job that waits; not part of the account
        self.num_held_sequences = 0
        self.num_prompt_tokens = 0  # of all ended prefills, for the hit rate
        self.num_cached_tokens = 0
        # dispatches that may be open here at once, after an ejection; None: as many as there is room for
        self.trial_limit: int | None = None
        self.tokens_per_s = 0.0
        self._window_start_s = 0.0
        self._window_tokens = 0

    def __str__(self) -> str:
        return f"worker {self.worker_id}, incarnation {self.incarnation}"

    @property
    def incarnation(self) -> int:
        return self.info.incarnation

    @property
    def takes_work(self) -> bool:
        """Whether new dispatches may go there."""
        return self.state is RoutingState.READY and not self.is_away

    @property
    def queue_s(self) -> float:
        """Returns the predicted seconds of prefill ahead of a new prompt."""
        return max(0.0, self.queued_prefill_s - self._progress_s)

    @property
    def num_free_blocks(self) -> int:
        """Returns the larger of two conservative counts: ours counts shared prefixes twice, the reported one
        counts reservations twice while they are pending."""
        ours = self.num_reserved_blocks + self.num_grown_tokens // self.info.layout.block_size
        return max(self.info.num_blocks - ours, self.load.num_free_blocks - self.num_pending_blocks)

    @property
    def may_send(self) -> bool:
        """Whether it may prefill for another worker: it waits for no KV itself. Otherwise, once workers swap
        roles, each could hold blocks for KV that another has no blocks left to compute."""
        return not self.num_pending_blocks

    @property
    def may_receive(self) -> bool:
        """Whether another worker may prefill for it: it holds no KV for another one. See `may_send`."""
        return not self.num_sending

    @property
    def room_tokens(self) -> int:
        """Returns the tokens that fit here at most, beside what is open; 0 when no sequence fits."""
        if not self.open_legs:
            return self.info.num_blocks * self.info.layout.block_size
        if self.num_sequences >= self.info.max_batch_size or not self.is_within_trial:
            return 0
        return self.num_free_blocks * self.info.layout.block_size

    def blocks_for(self, num_tokens: int, num_choices: int) -> int:
        """Returns the number of blocks of a prompt whose choices share it and grow by a block each."""
        return -(-num_tokens // self.info.layout.block_size) + num_choices

    def blocks_wanted(self, num_tokens: int, num_choices: int, num_expected_tokens: int) -> int:
        """Returns the number of blocks that a job takes now, and those that are to be kept for its growth, of
        `num_expected_tokens` a choice."""
        num_growth_tokens = int(self.growth_share * num_choices * num_expected_tokens)
        return self.blocks_for(num_tokens, num_choices) + num_growth_tokens // self.info.layout.block_size

    def widen_growth(self) -> None:
        """A sequence was preempted: more is kept for growth from now on."""
        self.growth_share = min(1.0, self.growth_share + GROWTH_STEP)

    def relax_growth(self) -> None:
        """A sequence has ended: a little less is kept for growth."""
        self.growth_share = max(GROWTH_SHARE, self.growth_share - GROWTH_STEP / 20)

    def is_short(self, num_tokens: int) -> bool:
        """Whether a prompt with so many uncached tokens overtakes longer ones: it fits into the half of a
        step that the oldest one leaves."""
        return 2 * num_tokens <= self.info.max_batch_tokens

    def has_prefill_room(self, num_tokens: int, limit_tokens: int | None) -> bool:
        """Whether a prompt with so many uncached tokens may be added. Only those count against the limit that
        a short one would not overtake."""
        if not self.is_within_trial:
            return False
        limit = 2 * self.info.max_batch_tokens if limit_tokens is None else limit_tokens
        is_short, num_short = self.is_short(num_tokens), self.num_short_tokens
        num_ahead = num_short if is_short else self.num_queued_tokens - num_short
        return not self.num_prefilling or (
            num_ahead < limit and self.num_prefilling < max(1, self.info.max_batch_size)
        )

    def has_decode_room(
        self, num_tokens: int, num_choices: int, num_expected_tokens: int = 0, *, with_held: bool = False
    ) -> bool:
        """Whether the worker has room now, also for a part of the tokens that it is expected to produce;
        `with_held`: or has some that is held for a job. An idle worker has room for anything that it can
        hold at all."""
        if not self.open_legs:
            return True
        held_blocks, held_sequences = self.num_held_blocks, self.num_held_sequences
        if with_held:
            held_blocks = held_sequences = 0
        if (
            self.num_sequences + num_choices > self.info.max_batch_size - held_sequences
            or not self.is_within_trial
        ):
            return False
        num_blocks = self.blocks_wanted(num_tokens, num_choices, num_expected_tokens)
        num_growth_blocks = int(self.growth_share * self.num_expected_tokens) // self.info.layout.block_size
        return num_blocks <= self.num_free_blocks - held_blocks - num_growth_blocks

    @property
    def is_within_trial(self) -> bool:
        return self.trial_limit is None or len(self.open_legs) < self.trial_limit

    def start_prefill(self, num_tokens: int, seconds: float) -> None:
        self.num_prefilling += 1
        self.num_queued_tokens += num_tokens
        self.num_short_tokens += num_tokens if self.is_short(num_tokens) else 0
        self.queued_prefill_s += seconds

    def end_prefill(self, num_tokens: int, seconds: float) -> None:
        self.num_prefilling -= 1
        self.num_queued_tokens -= num_tokens
        self.num_short_tokens -= num_tokens if self.is_short(num_tokens) else 0
        self.queued_prefill_s -= seconds
        self._progress_s = max(0.0, self._progress_s - seconds)
        if not self.num_prefilling:
            self.queued_prefill_s = self._progress_s = 0.0

    def progress(self, seconds: float) -> None:
        """Accounts for a step of `seconds` that computed some of the queued prefill."""
        if self.num_prefilling:
            self._progress_s += seconds

    def note_step(self, is_step: bool, now_s: float) -> None:
        """Called after each report; `is_step`: it reports a step and is not a mere heartbeat."""
        if is_step or not self.load.num_running or self._stepped_s is None:
            self._stepped_s = now_s

    def stalled_s(self, now_s: float) -> float:
        """Returns for how long the worker has had sequences to compute and has ended no step."""
        return now_s - self._stepped_s if self.load.num_running and self._stepped_s is not None else 0.0

    def count_tokens(self, num_tokens: int, now_s: float) -> None:
        """Counts tokens for `tokens_per_s`, over windows of at least a second."""
        self._window_tokens += num_tokens
        elapsed_s = now_s - self._window_start_s
        if elapsed_s >= 1.0:
            self.tokens_per_s = self._window_tokens / elapsed_s if elapsed_s < 5.0 else 0.0
            self._window_start_s, self._window_tokens = now_s, 0


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
            key = (decode_load(worker) + IDLE_LOAD) * worker.speed.decode_weight
            key += 0.0 if worker.may_receive else LAST
            ranking.put(worker.worker_id, key, worker)

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


def decode_load(worker: RegisteredWorker) -> float:
    """Returns the fraction of the batch, and of the blocks, that open decode legs take."""
    info = worker.info
    return worker.num_sequences / info.max_batch_size + worker.num_reserved_blocks / info.num_blocks
