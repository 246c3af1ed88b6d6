"""Random clients, workers and accidents: streams are always contiguous, endings unique and accounts balanced,
and once the accidents stop, everything ends and nothing is left."""

import random

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pdserve.core.messages import Role

from .world import World

NAMES = "abcdef"
WORKERS = ["prefill-0", "prefill-1", "decode-1", "decode-0"]
MOVES = ["obey", "work", "report"]


class RandomCluster(RuleBasedStateMachine):
    world: World

    @initialize(factor=st.sampled_from([None, 2.0]))
    def start(self, factor: float | None) -> None:
        self.world = World(factor)

    @rule(
        name=st.sampled_from(NAMES),
        num_tokens=st.integers(1, 50),
        max_tokens=st.integers(1, 6),
        n=st.integers(1, 3),
        patience_s=st.none() | st.floats(0.5, 20.0),
    )
    def submit(self, name: str, num_tokens: int, max_tokens: int, n: int, patience_s: float | None) -> None:
        self.world.submit(name, num_tokens, max_tokens, n, patience_s)

    @rule(name=st.sampled_from(NAMES), choice=st.none() | st.integers(0, 2))
    def cancel(self, name: str, choice: int | None) -> None:
        self.world.cancel(name, choice)

    @rule(name=st.sampled_from(NAMES))
    def stop_reading(self, name: str) -> None:
        self.world.stop_reading(name)

    @rule(name=st.sampled_from(NAMES))
    def read_on(self, name: str) -> None:
        self.world.read_on(name)

    @rule(seconds=st.floats(0.01, 5.0))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(name=st.sampled_from(WORKERS), role=st.sampled_from(Role))
    def start_or_kill(self, name: str, role: Role) -> None:
        self.world.start_or_kill(name, role)

    @rule(pick=st.integers(0, 3), role=st.none() | st.sampled_from(Role))
    def drain_or_assign(self, pick: int, role: Role | None) -> None:
        self.world.drain_or_assign(pick, role)

    @rule(picks=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(MOVES)), min_size=1, max_size=8))
    def run_workers(self, picks: list[tuple[int, str]]) -> None:
        self.world.run_workers(picks)

    @rule(pick=st.integers(0, 10))
    def break_a_leg(self, pick: int) -> None:
        self.world.break_a_leg(pick)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestRandomCluster = RandomCluster.TestCase
TestRandomCluster.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_life_with_many_accidents_loses_no_stream_and_leaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng.choice([None, 2.0]))
    for name in WORKERS[1:3]:
        world.start_or_kill(name, Role(name.rpartition("-")[0]))
    for _ in range(800):
        match rng.choices(
            ["submit", "run", "cancel", "wait", "kill", "drain", "break"], [12, 50, 3, 4, 3, 1, 6]
        )[0]:
            case "submit":
                patience_s = rng.choice([None, None, rng.uniform(0.1, 10.0)])
                world.submit(
                    rng.choice(NAMES), rng.randint(1, 50), rng.randint(1, 8), rng.randint(1, 3), patience_s
                )
            case "run":
                world.run_workers([(rng.randrange(4), rng.choice(MOVES)) for _ in range(5)])
            case "cancel":
                world.cancel(rng.choice(NAMES), rng.choice([None, 0, 1, 2]))
            case "wait":
                world.wait(rng.uniform(0.01, 0.5))
            case "kill":
                name = rng.choice(WORKERS)
                for _ in range(rng.choice([1, 2, 2])):
                    world.start_or_kill(name, Role(name.rpartition("-")[0]))
            case "drain":
                world.drain_or_assign(rng.randrange(4), rng.choice([None, *Role]))
            case "break":
                world.break_a_leg(rng.randrange(10))
    world.settle()
    counters = world.router.counters
    assert counters.finished > 5
    assert counters.resumed > 0
