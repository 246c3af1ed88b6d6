"""The router's state of a live request: its choices' streams, and the dispatches with open legs at workers.

LiveRequest --has--> ChoiceStream per choice        (what the client sees)
            --has--> Job, queued                     (choices that wait for workers)
            --has--> Dispatch per attempt            (choices at workers; legs until LegEnded or WorkerLost)
"""

import enum
from collections.abc import Iterable

from ..core.automaton import Automaton
from ..core.messages import Leg, LegEnded
from ..core.request import HeldSpec, Request, SequenceSpec, TransferId, identity_of, shared_fields
from ..core.token_ids import digest
from .candidates import RoutingDecision
from .kept_stream import KeptStream
from .planning import MAX_CLIENT_CHARS, OpenRequest
from .prefix_index import PrefixChain
from .registered_worker import RegisteredWorker
from .request_states import TRANSITIONS, RequestState
from .stream import ChoiceStream

PROGRESS_TOKENS = 16  # of one choice, from one dispatch
# more than a worker can have computed, beyond those that it had reported, when it died
SURVIVAL_TOKENS = 4
SURVIVAL_GROWTH = 8  # with each earlier request like it that was over before it was cleared


class DispatchState(enum.Enum):
    """Whether a dispatch's tokens are wanted. Legs may be open in each state."""

    RUNNING = "running"
    FINISHED = "finished"  # each of its choices has ended, for whatever reason
    FAILED = "failed"  # its unfinished choices are served elsewhere


DISPATCH_TRANSITIONS = {
    DispatchState.RUNNING: {DispatchState.FINISHED, DispatchState.FAILED},
    DispatchState.FINISHED: set[DispatchState](),
    DispatchState.FAILED: set[DispatchState](),
}


class LiveRequest(Automaton[RequestState]):
    """A request between admission and the end of its last leg. `request_life.py` alone moves it from state to
    state."""

    __slots__ = (
        "dispatches",
        "ended_s",
        "error",
        "expected_length",
        "first_token_s",
        "held",
        "jobs",
        "keeps_place",
        "kept",
        "num_open_choices",
        "num_open_legs",
        "num_survival_tokens",
        "num_times_displaced",
        "num_times_unread",
        "request",
        "streams",
        "submitted_s",
        "suspects",
    )

    def __init__(self, request: Request, now_s: float, *, held: HeldSpec | None = None) -> None:
        """`held`: a worker's report of it, when it is taken over from an earlier router. `request` has no
        prompt then, until its client is back."""
        super().__init__(TRANSITIONS, RequestState.UNCLAIMED if held else RequestState.QUEUED, at_s=now_s)
        self.request = request
        self.held = held
        self.streams = [ChoiceStream(choice) for choice in range(request.sampling.n)]
        self.num_open_choices = request.sampling.n
        self.expected_length = request.sampling.max_tokens  # of each choice, in tokens
        self.submitted_s = now_s
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.error: str | None = None
        self.dispatches: list[Dispatch] = []
        self.jobs: list[Job] = []  # in the queue; when it is UNREAD, set aside
        self.kept = KeptStream(request.request_id)  # for its client, which is not connected
        self.num_times_displaced = 0
        self.keeps_place = False  # it has got a place although something of higher priority waited
        self.num_times_unread = 0
        self.num_open_legs = 0
        # choices that were at a worker when its process died, and have not run alone since
        self.suspects: set[int] = set()
        self.num_survival_tokens = SURVIVAL_TOKENS  # of each choice, alone

    def __str__(self) -> str:
        return f"request {self.request_id!r}"

    def suspect_from_the_start(self, num_deaths: int) -> None:
        """Lets all choices run alone first, as workers' processes have died under requests like this one. It
        has to survive for longer each time, as it may be over each time before the next death."""
        self.suspects = set(range(self.request.sampling.n))
        self.num_survival_tokens = SURVIVAL_TOKENS * SURVIVAL_GROWTH ** min(num_deaths, 8)

    @property
    def is_likely_deadly(self) -> bool:
        """Whether it was a suspect from the start."""
        return self.num_survival_tokens > SURVIVAL_TOKENS

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return self.held.num_prompt_tokens if self.held else len(self.request.prompt_token_ids)

    @property
    def prompt_digest(self) -> bytes:
        return self.held.prompt_digest if self.held else digest(self.request.prompt_token_ids)

    def is_held_for(self, request: Request) -> bool:
        """Whether it is the client's `request`, taken over from an earlier router."""
        return self.held is not None and self.held.identity == identity_of(request)

    def running(self) -> list["Dispatch"]:
        """Returns the dispatches that workers are working on."""
        return [dispatch for dispatch in self.dispatches if dispatch.state is DispatchState.RUNNING]

    def settle(self, now_s: float) -> None:
        """Enters the state that follows from where the request's work is."""
        if self.running():
            target = RequestState.RUNNING
        elif any(job.ready_s <= now_s and not job.awaits_verdict for job in self.jobs):
            target = RequestState.QUEUED
        else:
            target = RequestState.BACKING_OFF
        if target is not self.state:
            self.transition(target, now_s)

    def story(self) -> list[str]:
        """Returns the request's recent states, then its attempts."""
        return super().story() + [dispatch.summary() for dispatch in self.dispatches]

    def check_integrity(self, queued: set[int]) -> None:
        """Raises AssertionError when the state disagrees with where the work is. `queued`: ids of the queue's
        jobs."""
        state = self.state
        assert state is not RequestState.CLOSED, f"{self}: closed but still registered"
        assert state is not RequestState.ENDED or self.num_open_legs, (
            f"{self}: ended, without legs, and not closed"
        )
        assert state.has_client == (not self.kept) or state is RequestState.UNCLAIMED, (
            f"{self}: {state}, something is kept: {bool(self.kept)}"
        )
        running = [choice for dispatch in self.running() for choice in dispatch.streams]
        waiting = [choice for job in self.jobs for choice in job.choices]
        unfinished = [stream.choice for stream in self.streams if stream.finish_reason is None]
        assert len(unfinished) == self.num_open_choices or state.is_over, (
            f"{self}: {unfinished} are not finished"
        )
        is_aside = not state.is_served
        assert all((id(job) in queued) != is_aside for job in self.jobs), (
            f"{self}: {state}, but its jobs are elsewhere"
        )
        match state:
            case RequestState.QUEUED | RequestState.BACKING_OFF | RequestState.UNREAD:
                assert not running and waiting, f"{self}: {state}, {running} run, {waiting} wait"
            case RequestState.RUNNING:
                assert running, f"{self}: is running nowhere"
            case _:
                assert not waiting, f"{self}: {state}, and {waiting} wait"
        if state.is_served or state is RequestState.UNREAD:
            left = [choice for choice in running + waiting if choice in unfinished]
            assert sorted(left) == unfinished, f"{self}: {unfinished} are left, {running} run, {waiting} wait"

    def unserved_jobs(self, now_s: float) -> list["Job"]:
        """Returns jobs for the choices that no running dispatch is to produce."""
        served = {choice for dispatch in self.running() for choice in dispatch.streams}
        return self.jobs_for((stream for stream in self.streams if stream.choice not in served), now_s)

    def jobs_for(self, streams: Iterable[ChoiceStream], now_s: float) -> list["Job"]:
        """Returns the remaining work: choices without a token together, each other choice by itself from its
        client's position."""
        unfinished = [stream for stream in streams if stream.finish_reason is None]
        for stream in unfinished:
            stream.forget_held()
        fresh = tuple(stream.choice for stream in unfinished if not stream.token_ids)
        jobs = [Job(self, fresh, (), now_s)] if fresh else []
        return jobs + [Job(self, (s.choice,), tuple(s.token_ids), now_s) for s in unfinished if s.token_ids]

    def facts(self) -> OpenRequest:
        placement = self.dispatches[-1].placement if self.dispatches else None
        return OpenRequest(
            at_s=self.submitted_s,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=0 if placement is None else placement.num_cached_tokens,
            num_output_tokens=sum(len(stream.token_ids) for stream in self.streams),
            client=self.request.client[:MAX_CLIENT_CHARS],
            first_token_s=self.first_token_s,
        )


class Job:
    """Choices of one request that wait for workers together."""

    __slots__ = (
        "_chains",
        "awaits_worker_since_s",
        "choices",
        "failed_pairs",
        "failed_workers",
        "live",
        "num_failures",
        "num_passing",
        "output_token_ids",
        "passed_since_s",
        "queued_s",
        "ready_s",
        "was_unread",
    )

    def __init__(
        self, live: LiveRequest, choices: tuple[int, ...], output: tuple[int, ...], now_s: float
    ) -> None:
        self.live = live
        self.choices = choices
        self.output_token_ids = output
        self.queued_s = now_s
        self.ready_s = now_s
        self.awaits_worker_since_s: float | None = None  # None: a ready worker can serve it
        self.num_failures = 0
        self.passed_since_s: float | None = None  # when others first passed it, as it is large
        self.num_passing = 0  # jobs of its own client that have
        self.was_unread = False  # its client did not read: what is computed again is charged
        # these incarnations
        self.failed_pairs: frozenset[tuple[RegisteredWorker, RegisteredWorker | None]] = frozenset()
        # incarnations that reported those failures
        self.failed_workers: frozenset[RegisteredWorker] = frozenset()
        self._chains: dict[int, PrefixChain] = {}

    @property
    def awaits_verdict(self) -> bool:
        """Whether it is not known yet if a worker has died of it: it runs nowhere meanwhile."""
        return any(
            dispatch.num_verdicts_due and not dispatch.streams.keys().isdisjoint(self.choices)
            for dispatch in self.live.dispatches
        )

    @property
    def is_suspect(self) -> bool:
        """Whether it has to run alone."""
        return not self.live.suspects.isdisjoint(self.choices)

    @property
    def client(self) -> str:
        return self.live.request.client

    @property
    def priority(self) -> int:
        return self.live.request.priority

    @property
    def num_tokens(self) -> int:
        return self.live.num_prompt_tokens + len(self.output_token_ids)

    @property
    def computes_whole_prompt(self) -> bool:
        """Whether a cached prefix is useless: the log probabilities of the prompt are still due, with choice
        0's first token."""
        return (
            self.live.request.sampling.prompt_logprobs is not None
            and 0 in self.choices
            and not self.output_token_ids
        )

    @property
    def needs_decode(self) -> bool:
        """False when the token sampled by the prefill is the last one: no reservation and no transfer
        then."""
        return self.live.request.sampling.max_tokens - len(self.output_token_ids) > 1

    @property
    def num_total_tokens(self) -> int:
        """The number of tokens that a worker's KV cache must be able to hold to finish one choice."""
        return self.live.num_prompt_tokens + self.live.request.sampling.max_tokens

    @property
    def num_expected_tokens(self) -> int:
        """The number of tokens that each choice is still expected to bring: 0 when it is longer already."""
        return max(0, self.live.expected_length - len(self.output_token_ids))

    def chain(self, block_size: int) -> PrefixChain:
        if block_size not in self._chains:
            tokens = self.live.request.prompt_token_ids + self.output_token_ids
            self._chains[block_size] = PrefixChain(tokens, block_size, self.live.request.cache_salt)
        return self._chains[block_size]

    def spec(self, attempt: int) -> SequenceSpec:
        request = self.live.request
        return SequenceSpec(
            transfer=TransferId(request.request_id, attempt),
            choices=self.choices,
            output_token_ids=self.output_token_ids,
            client=request.client,
            **shared_fields(request),
        )


class Dispatch(Automaton[DispatchState]):
    """One attempt of a job at one worker or a pair of workers, and its account there."""

    __slots__ = (
        "cancelled",
        "decode",
        "decode_ended",
        "decode_started",
        "dispatched_s",
        "ended_s",
        "failure",
        "first_token_s",
        "is_alone",
        "is_prefilling",
        "is_uncounted",
        "job",
        "live",
        "num_booked",
        "num_expected_tokens",
        "num_grown_tokens",
        "num_new_tokens",
        "num_reserved_blocks",
        "num_steps",
        "num_unfinished",
        "num_verdicts_due",
        "open_legs",
        "placement",
        "prefill",
        "prefill_ended",
        "prefill_s",
        "spec",
        "streams",
    )

    def __init__(
        self,
        job: Job,
        spec: SequenceSpec | HeldSpec,
        prefill: RegisteredWorker,
        decode: RegisteredWorker | None,
        now_s: float,
    ) -> None:
        super().__init__(DISPATCH_TRANSITIONS, DispatchState.RUNNING, at_s=now_s)
        self.job = job
        self.live = job.live
        self.spec = spec
        self.prefill = prefill
        self.decode = decode
        self.open_legs = set[Leg]()
        if decode is not prefill:
            self.open_legs.add(Leg.PREFILL)
        if decode is not None:
            self.open_legs.add(Leg.DECODE)
        self.streams = {choice: self.live.streams[choice] for choice in job.choices}
        self.num_unfinished = sum(stream.finish_reason is None for stream in self.streams.values())
        self.is_uncounted = False  # its failure counts once it is known that no worker died
        self.num_verdicts_due = 0  # lost workers of it of which it is not known whether they died
        self.cancelled = False  # a choice ended by decision, unknown to workers
        self.decode_started = False  # the decode worker has sent a token, so it has all the KV
        self.is_prefilling = True
        self.is_alone = job.is_suspect
        self.num_booked = len(spec.choices)  # choices on its workers' accounts
        self.num_grown_tokens = 0
        self.num_expected_tokens = 0  # that it is still expected to bring, all choices
        self.num_reserved_blocks = 0
        self.num_new_tokens = 0
        self.prefill_s = 0.0
        self.placement: RoutingDecision | None = None  # None until it is booked
        self.dispatched_s = now_s
        self.first_token_s: float | None = None
        self.ended_s: float | None = None  # when it failed
        self.num_steps = 0  # that it had brought then
        self.failure: str | None = None
        self.prefill_ended: LegEnded | None = None
        self.decode_ended: LegEnded | None = None

    def __str__(self) -> str:
        return f"dispatch {self.transfer}"

    @property
    def transfer(self) -> TransferId:
        return self.spec.transfer

    @property
    def priority(self) -> int:
        return self.spec.priority

    @property
    def is_served_by_one(self) -> bool:
        """Whether one worker does both phases, as one leg (DECODE)."""
        return self.prefill is self.decode

    @property
    def is_pair(self) -> bool:
        """Whether KV goes from one worker to another."""
        return self.decode is not None and self.decode is not self.prefill

    @property
    def pair(self) -> tuple[RegisteredWorker, RegisteredWorker | None]:
        return self.prefill, self.decode

    def worker_of(self, leg: Leg) -> RegisteredWorker | None:
        """Returns the worker of `leg`; None when this dispatch has no such leg."""
        if leg is Leg.DECODE:
            return self.decode
        return None if self.is_served_by_one else self.prefill

    def leg_at(self, worker: RegisteredWorker) -> Leg:
        """Returns the leg that `worker` carries out."""
        return Leg.DECODE if worker is self.decode else Leg.PREFILL

    def needs(self, leg: Leg) -> bool:
        """Whether the dispatch fails with this leg. A prefill has done its part once the decode worker has
        produced a token (so it has all the KV) and the client has all first tokens."""
        if self.state is not DispatchState.RUNNING:
            return False
        return leg is Leg.DECODE or not (self.decode_started and self._has_all_first_tokens())

    def _has_all_first_tokens(self) -> bool:
        """Whether every choice has the token that its prefill samples."""
        return all(len(stream.token_ids) > self.spec.num_output_tokens for stream in self.streams.values())

    @property
    def has_progressed(self) -> bool:
        """Whether clients have so much from it that its failure is not the request's. The first token is the
        prefill worker's alone, and a request that breaks each worker a step later would never end."""
        return self.count_steps() >= PROGRESS_TOKENS

    @property
    def has_survived(self) -> bool:
        """Whether each choice is past the point where a worker died under it, or has ended."""
        num_enough = self.spec.num_output_tokens + self.live.num_survival_tokens
        return all(
            stream.finish_reason is not None or len(stream.token_ids) >= num_enough
            for stream in self.streams.values()
        )

    def summary(self) -> str:
        """Returns one line for the request's story."""
        workers = " and ".join(worker.worker_id for worker in dict.fromkeys(self.pair) if worker is not None)
        legs = ", ".join(leg.value for leg in Leg if leg in self.open_legs) or "none"
        return f"attempt {self.transfer.attempt} at {workers}: {', '.join(self.story())}; open legs: {legs}"

    def unfinished_jobs(self, now_s: float) -> list[Job]:
        """Returns jobs for the work that this dispatch has not finished."""
        return self.live.jobs_for(self.streams.values(), now_s)

    def fail(self, failure: str, now_s: float) -> None:
        """Marks the dispatch as failed: its unfinished choices will be served elsewhere."""
        self.transition(DispatchState.FAILED, now_s, failure)
        self.failure, self.ended_s, self.num_steps = failure, now_s, self.count_steps()

    def count_steps(self) -> int:
        """Returns the largest number of tokens that a choice has from this dispatch."""
        num_tokens = max(len(stream.token_ids) for stream in self.streams.values())
        return num_tokens - self.spec.num_output_tokens
