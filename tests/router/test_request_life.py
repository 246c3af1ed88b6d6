"""A request is one automaton: a complete table, and errors that include the request's history."""

import random
import typing
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import pdserve
from pdserve.core.errors import DuplicateRequest, KillsWorkers, NoWorkerAvailable, QueueFull, UnexpectedEvent
from pdserve.core.failures import FailureKind
from pdserve.core.messages import (
    HeldLeg,
    Leg,
    LegEnded,
    Prefill,
    Reserve,
    Role,
    Serve,
    StepReport,
    TokenOutput,
    WorkerInfo,
    WorkerLoad,
)
from pdserve.core.request import FinishReason, HeldSpec, SequenceSpec
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import (
    Adopted,
    Cancel,
    LossCause,
    RouterCommand,
    RouterEvent,
    SendCommand,
    StreamRead,
    StreamUnread,
    Submit,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerRole,
    WorkersExpected,
)
from pdserve.router.live_request import LiveRequest
from pdserve.router.request_events import (
    Abandoned,
    CancelChoice,
    Claimed,
    Displaced,
    Due,
    End,
    Judged,
    RequestEvent,
    Survived,
)
from pdserve.router.request_life import Ignored, Illegal, RequestLife
from pdserve.router.request_states import TRANSITIONS, RequestState

from .cluster import Cluster, make_request, worker_info

TABLE = RequestLife.REACTIONS
DOCS = Path(pdserve.__file__).resolve().parent.parent / "docs"


def live_request(cluster: Cluster, name: str = "r") -> LiveRequest:
    return cluster.router._requests._requests[name]


def test_every_state_defines_a_reaction_to_every_event() -> None:
    assert set(TABLE) == set(typing.get_args(RequestEvent))
    for event, reactions in TABLE.items():
        assert list(reactions) == list(RequestState), event
        for reaction in reactions.values():
            assert isinstance(reaction, Illegal) or (
                reaction.reason if isinstance(reaction, Ignored) else callable(reaction)
            )


def test_every_reaction_of_the_life_is_in_its_table() -> None:
    used = {reaction for reactions in TABLE.values() for reaction in reactions.values()}
    public = {
        value for name, value in vars(RequestLife).items() if callable(value) and not name.startswith("_")
    }
    changes_no_state = {RequestLife.await_verdict}
    assert public - used == {RequestLife.handle, RequestLife.begin} | changes_no_state


def test_every_state_can_be_reached_and_leads_to_the_close() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    reached = {RequestState.QUEUED, RequestState.UNCLAIMED}
    for _ in RequestState:
        reached |= {target for state in reached for target in TRANSITIONS[state]}
    assert reached == set(RequestState)
    closing = {RequestState.CLOSED}
    for _ in RequestState:
        closing |= {state for state in RequestState if TRANSITIONS[state] & closing}
    assert closing == set(RequestState)


@pytest.mark.parametrize("page", ["architecture.md", "adr/0004-one-automaton-per-request.md"])
def test_the_drawn_states_are_those_of_the_code(page: str) -> None:
    diagram = (DOCS / page).read_text().partition("stateDiagram-v2\n")[2].partition("```")[0]
    arrows = [line.partition(":")[0].split(" --> ") for line in diagram.splitlines() if "-->" in line]
    drawn = {(source.strip(), target.strip()) for source, target in arrows}
    entries = {("[*]", "QUEUED"), ("[*]", "UNCLAIMED"), ("CLOSED", "[*]")}
    assert drawn - entries == {
        (state.name, target.name) for state, targets in TRANSITIONS.items() for target in targets
    }
    assert entries < drawn


def test_an_illegal_event_reports_the_requests_story() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None))
    cluster.now_s = 1.5
    cluster.submit(make_request())
    first, second = ("decode-0", "decode-1") if cluster.sent["decode-0"] else ("decode-1", "decode-0")
    cluster.now_s = 2.0
    cluster.lose(first)
    live = live_request(cluster)
    with pytest.raises(UnexpectedEvent) as raised:
        cluster.router._requests.handle(live, Abandoned(), 2.5)
    story = str(raised.value)
    assert "request 'r'" in story
    assert "Abandoned cannot come in RequestState.RUNNING" in story
    assert "queued at 1.500 s', 'running at 1.500 s" in story
    failed = f"running at 1.500 s, failed at 2.000 s ({first}: killed)"
    assert f"attempt 0 at prefill-0 and {first}: {failed}; open legs: prefill" in story
    assert f"attempt 1 at prefill-0 and {second}: running at 2.000 s; open legs: prefill, decode" in story
    assert live.state is RequestState.RUNNING


def test_a_request_continues_after_an_illegal_event() -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request())
    with pytest.raises(UnexpectedEvent):
        cluster.router._requests.handle(live_request(cluster), Claimed(make_request()), 0.0)
    cluster.token("both-0", 0, FinishReason.LENGTH)
    cluster.leg_ended("both-0", Leg.DECODE)
    assert cluster.closed["r"]


@pytest.mark.parametrize(
    "event",
    [End(FinishReason.CANCELLED), CancelChoice(0, FinishReason.STOP), StreamUnread("r"), StreamRead("r")],
)
def test_a_client_may_speak_of_a_request_that_has_ended(event: RequestEvent) -> None:
    cluster = Cluster("both-0")
    cluster.submit(make_request())
    cluster.handle(Cancel("r"))
    live = live_request(cluster)
    assert live.state is RequestState.ENDED
    assert cluster.router._requests.handle(live, event, 1.0) == []
    assert live.state is RequestState.ENDED


def test_a_request_backs_off_and_is_queued_when_it_is_due() -> None:
    cluster = Cluster("both-0", "both-1", config=RouterConfig(max_attempts=9))
    cluster.submit(make_request())
    states = []
    for _ in range(2):
        worker = next(name for name, legs in cluster.num_legs().items() if legs)
        cluster.leg_ended(worker, Leg.DECODE, "broken")
        states.append(live_request(cluster).state)
    assert states == [RequestState.RUNNING, RequestState.BACKING_OFF]
    for worker in ("both-0", "both-1"):
        cluster.handle(WorkerDraining(worker))
    due_s = cluster.router.next_tick_s()
    assert due_s is not None
    cluster.handle(WorkersExpected(1))
    cluster.now_s = due_s
    cluster.handle(Tick())
    assert live_request(cluster).state is RequestState.QUEUED
    held = HeldSpec.of(cluster.spec("both-0"))
    with pytest.raises(UnexpectedEvent):
        cluster.router._requests.handle(LiveRequest(make_request(), 0.0, held=held), Due(), 0.0)


NAMES = st.sampled_from("abc")
WORKERS = ("both-0", "prefill-1", "decode-2")
NUM_TOKENS = 4
WEIGHTS = [25, 4, 12, 10, 3, 3, 2, 20, 25, 2]
NUM_RECENT = 6  # pieces of work that workers report on
WAYS_TO_END = [("broken", False), ("broken", False), ("broken", False), (None, False), ("refused", True)]
ENDINGS = ["", "", "", None, "broken"]  # of a held leg: none yet, normal, or failed


class AnyEvents(RuleBasedStateMachine):
    """Arbitrary events in any order: workers that break every rule, clients that come and go, routers that
    die."""

    router: Router

    @initialize()
    def start(self) -> None:
        self.now_s = 0.0
        self.incarnations: dict[str, int] = {}
        self.specs: list[tuple[str, Leg, SequenceSpec]] = []  # workers' commands, the latest last
        self.num_routers = 0
        self.lost = WorkerLost("nobody", 1)
        self.restart([])
        self.come_or_go("both-0")

    def handle(self, event: RouterEvent) -> None:
        for command in self.router.handle(event, self.now_s):
            if isinstance(command, SendCommand) and isinstance(command.command, Prefill | Reserve | Serve):
                leg = Leg.PREFILL if isinstance(command.command, Prefill) else Leg.DECODE
                self.specs.append((command.worker_id, leg, command.command.spec))
        self.router.check_integrity()

    def given(self, pick: int) -> tuple[str, Leg, SequenceSpec] | None:
        recent = self.specs[-NUM_RECENT:]
        return recent[pick % len(recent)] if recent else None

    @rule(name=NAMES, n=st.sampled_from([1, 1, 1, 2]), patience_s=st.none() | st.floats(0.1, 9.0))
    def submit(self, name: str, n: int, patience_s: float | None) -> None:
        deadline_s = None if patience_s is None else self.now_s + patience_s
        try:
            self.handle(
                Submit(make_request(name, max_tokens=NUM_TOKENS, n=n, deadline_s=deadline_s, client=name))
            )
        except (DuplicateRequest, KillsWorkers, NoWorkerAvailable, QueueFull):
            self.router.check_integrity()

    @rule(name=NAMES, choice=st.none() | st.integers(-1, 2))
    def cancel(self, name: str, choice: int | None) -> None:
        self.handle(Cancel(name, FinishReason.CANCELLED if choice is None else FinishReason.STOP, choice))

    @rule(name=NAMES, reads=st.booleans())
    def read(self, name: str, reads: bool) -> None:
        self.handle(StreamRead(name) if reads else StreamUnread(name))

    @rule(seconds=st.floats(0.001, 20.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.handle(Tick())

    @rule(cause=st.sampled_from(LossCause))
    def explain(self, cause: LossCause) -> None:
        self.handle(msgspec.structs.replace(self.lost, cause=cause))

    @rule(name=st.sampled_from(WORKERS), cause=st.sampled_from(LossCause))
    def come_or_go(self, name: str, cause: LossCause = LossCause.GONE) -> None:
        if name in self.incarnations and self.incarnations[name] % 2:
            self.lost = WorkerLost(name, self.incarnations[name], "killed", cause)
            self.handle(self.lost)
            self.incarnations[name] += 1
        else:
            self.incarnations[name] = self.incarnations.get(name, 0) + 1
            self.handle(WorkerReady(self.info(name)))

    @rule(name=st.sampled_from(WORKERS), role=st.none() | st.sampled_from(Role))
    def drain_or_assign(self, name: str, role: Role | None) -> None:
        self.handle(WorkerDraining(name) if role is None else WorkerRole(name, role))

    @rule(
        pick=st.integers(0, NUM_RECENT - 1),
        at=st.integers(0, NUM_TOKENS),
        choice=st.integers(0, 1),
        last=st.booleans(),
    )
    def token(self, pick: int, at: int, choice: int, last: bool) -> None:
        if (given := self.given(pick)) is not None:
            worker, _, spec = given
            output = TokenOutput(spec.transfer, choice, at, 100 + at, FinishReason.STOP if last else None)
            report = StepReport(
                worker_id=worker, incarnation=self.incarnations[worker], load=WorkerLoad(), outputs=(output,)
            )
            self.handle(report)

    @rule(pick=st.integers(0, NUM_RECENT - 1), how=st.sampled_from(WAYS_TO_END))
    def end_leg(self, pick: int, how: tuple[str | None, bool]) -> None:
        if (given := self.given(pick)) is not None:
            worker, leg, spec = given
            self.handle(self.ended(worker, leg, spec, *how))

    @rule(held=st.lists(st.tuples(st.integers(0, NUM_TOKENS), st.sampled_from(ENDINGS)), max_size=NUM_RECENT))
    def restart(self, held: list[tuple[int, str | None]]) -> None:
        """Starts another router over workers that hold their recent work, with tokens and endings."""
        legs: dict[str, dict[tuple[object, Leg], HeldLeg]] = {name: {} for name in WORKERS}
        for (worker, leg, spec), (num_tokens, error) in zip(reversed(self.specs), held, strict=False):
            outputs = tuple(
                TokenOutput(
                    spec.transfer,
                    choice,
                    index,
                    100 + index,
                    FinishReason.LENGTH if index == NUM_TOKENS - 1 else None,
                )
                for choice in spec.choices
                for index in range(len(spec.output_token_ids), num_tokens)
            )
            ended = None if error == "" else self.ended(worker, leg, spec, error, False)
            legs[worker][spec.transfer, leg] = HeldLeg.of(spec, leg, outputs, has_partner=True, ended=ended)
        self.num_routers += 1
        config = RouterConfig(max_queued_requests=3, claim_timeout_s=5.0, retry_delay_s=5.0, max_attempts=4)
        self.router = Router(config, first_attempt=1000 * self.num_routers, adopts=True)
        for name, incarnation in self.incarnations.items():
            if incarnation % 2:
                self.handle(WorkerReady(self.info(name), tuple(legs[name].values())))
        self.handle(Adopted())

    def info(self, name: str) -> WorkerInfo:
        role = Role(name.rpartition("-")[0])
        return worker_info(
            name,
            role,
            incarnation=self.incarnations[name],
            num_blocks=16,
            max_batch_size=2,
            max_model_len=256,
        )

    def ended(
        self, worker: str, leg: Leg, spec: SequenceSpec, error: str | None, is_invalid: bool
    ) -> LegEnded:
        return LegEnded(
            worker_id=worker,
            incarnation=self.incarnations[worker],
            transfer=spec.transfer,
            leg=leg,
            error=error,
            kind=None if error is None else FailureKind.INVALID if is_invalid else FailureKind.LOST,
        )


def a_random_step(cluster: AnyEvents, rng: random.Random) -> None:
    pick, name = rng.randrange(NUM_RECENT), rng.choice("abc")
    match rng.choices(
        ["submit", "cancel", "read", "wait", "go", "explain", "drain", "token", "end", "restart"], WEIGHTS
    )[0]:
        case "submit":
            cluster.submit(name, rng.choice([1, 2, 2]), rng.choice([None, None, 3.0]))
        case "cancel":
            cluster.cancel(name, rng.choice([None, 0, 1]))
        case "read":
            cluster.read(name, rng.random() < 0.4)
        case "wait":
            cluster.wait(rng.choice([0.01, 0.5, 3.0]))
        case "go":
            cluster.come_or_go(rng.choice(WORKERS), rng.choice(list(LossCause)))
        case "explain":
            cluster.explain(rng.choice([LossCause.GONE, LossCause.DIED]))
        case "drain":
            cluster.drain_or_assign(rng.choice(WORKERS), rng.choice([None, *Role]))
        case "token":
            cluster.token(pick, rng.randrange(NUM_TOKENS), rng.randrange(2), rng.random() < 0.3)
        case "end":
            cluster.end_leg(pick, rng.choice(WAYS_TO_END))
        case "restart":
            cluster.restart(
                [
                    (rng.randrange(NUM_TOKENS + 1), rng.choice(ENDINGS))
                    for _ in range(rng.randrange(NUM_RECENT))
                ]
            )


def test_random_lives_reach_every_reaction_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[tuple[type, RequestState]] = set()
    react = RequestLife._react

    def note(life: RequestLife, live: LiveRequest, event: RequestEvent, now_s: float) -> list[RouterCommand]:
        reached.add((type(event), live.state))
        return react(life, live, event, now_s)

    monkeypatch.setattr(RequestLife, "_react", note)
    for seed in range(16):
        rng, cluster = random.Random(seed), AnyEvents()
        cluster.start()
        for _ in range(1000):
            a_random_step(cluster, rng)
    possible = {
        (event, state)
        for event, reactions in TABLE.items()
        for state, reaction in reactions.items()
        if not isinstance(reaction, Illegal)
    }
    rare = {  # covered by test_adoption.py and test_query_of_death.py
        (Displaced, RequestState.UNCLAIMED),
        (Judged, RequestState.RUNNING),
        (Survived, RequestState.RUNNING),
    }
    assert possible - reached <= rare
    assert reached <= possible


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
