"""One incarnation of a worker as the router sees it: its state, and the account of what is open there."""

import enum
from math import inf

from ..core.automaton import Automaton
from ..core.messages import WorkerInfo, WorkerLoad
from ..core.request import TransferId
from ..core.worker_speed import WorkerSpeed

# a part of the expected growth of a worker's sequences, as others end meanwhile: more where some have been
# preempted
GROWTH_SHARE = 0.1
GROWTH_STEP = 0.1


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


def decode_load(worker: RegisteredWorker) -> float:
    """Returns the fraction of the batch, and of the blocks, that open decode legs take."""
    info = worker.info
    return worker.num_sequences / info.max_batch_size + worker.num_reserved_blocks / info.num_blocks
