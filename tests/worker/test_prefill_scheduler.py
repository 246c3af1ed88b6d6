"""Prefill steps divide their tokens so that long and short prompts delay each other only by a bounded
amount."""

import msgspec
from hypothesis import given, settings, strategies as st

from pdserve.core.sharing import FLOOR
from pdserve.engine.batch import Batch
from pdserve.engine.sequence import Sequence
from pdserve.prefill_worker.scheduler import PrefillScheduler

from .chain_model import ChainEngine, spec


class Prefills:
    """A scheduler and its block pool. Blocks of a computed prompt are released at once."""

    def __init__(self, num_blocks: int = 64, budget: int = 16) -> None:
        self.engine = ChainEngine(num_blocks, max_model_len=128)
        self.scheduler = PrefillScheduler(self.engine.kv, budget)
        self.done: list[str] = []
        self._num_added = 0

    def add(self, name: str, num_tokens: int, priority: int = 0) -> Sequence:
        self._num_added += 1  # no two prompts share a prefix
        tokens = range(1000 * self._num_added, 1000 * self._num_added + num_tokens)
        prioritised = msgspec.structs.replace(spec(name, tokens, 2), priority=priority)
        seq = Sequence(prioritised, 0, self.engine.kv.max_model_len)
        self.scheduler.add(seq)
        return seq

    def step(self) -> dict[str, int]:
        """Returns the tokens that each prompt gets in one step."""
        batch = self.scheduler.schedule()
        if batch is None:
            return {}
        self._compute(batch)
        return {chunk.sequence.transfer.request_id: chunk.num_tokens for chunk in batch.chunks}

    def _compute(self, batch: Batch) -> None:
        self.scheduler.complete(batch)
        for chunk in batch.chunks:
            if not chunk.sequence.num_uncomputed_tokens:
                self.done.append(chunk.sequence.transfer.request_id)
                self.engine.kv.release(chunk.sequence)


def test_a_prompt_that_is_alone_gets_all_of_the_budget() -> None:
    prefills = Prefills(budget=16)
    prefills.add("long", 40)
    assert [prefills.step() for _ in range(3)] == [{"long": 16}, {"long": 16}, {"long": 8}]


def test_a_long_prompt_leaves_half_of_each_step_to_short_ones() -> None:
    prefills = Prefills(budget=16)
    prefills.add("long", 100)
    prefills.step()
    for name in ("a", "b", "c"):
        prefills.add(name, 4)
    assert prefills.step() == {"long": 8, "a": 4, "b": 4}
    assert prefills.step() == {"long": 12, "c": 4}


def test_a_short_prompt_waits_for_no_long_ones() -> None:
    prefills = Prefills(budget=16)
    for number in range(3):
        prefills.add(f"long{number}", 50)
    prefills.step()
    prefills.add("short", 5)
    assert prefills.step()["short"] == 5


def test_a_stream_of_short_prompts_at_most_doubles_a_long_ones_time() -> None:
    prefills = Prefills(budget=16)
    prefills.add("long", 80)
    steps = 0
    while "long" not in prefills.done:
        for number in range(4):
            prefills.add(f"short{steps}-{number}", 8)
        assert prefills.step()["long"] >= 8
        steps += 1
    assert steps == 2 * 80 // 16


def test_prompts_as_long_as_the_oldest_wait_for_its_prefix() -> None:
    prefills = Prefills(budget=16)
    prefills.add("a", 40)
    prefills.add("b", 40)
    assert prefills.step() == {"a": 16}
    assert prefills.step() == {"a": 16}
    assert prefills.step() == {"a": 8, "b": 8}


def test_no_prompt_takes_blocks_before_the_oldest_waiting_one() -> None:
    prefills = Prefills(num_blocks=10, budget=16)
    block_size = prefills.engine.pool.block_size
    running = prefills.add("running", 6 * block_size)
    prefills.step()
    prefills.add("large", 8 * block_size)
    prefills.add("small", block_size)
    # as when the prompt is computed and its transfer still holds the blocks
    prefills.scheduler.remove(running)
    assert prefills.step() == {}
    prefills.engine.kv.release(running)
    assert "large" in prefills.step()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=1, max_size=12),
    st.integers(3, 32),
    st.integers(16, 40),
)
def test_every_step_is_full_or_exhausts_admitted_prompts_and_all_end(
    arrivals: list[tuple[int, int]], budget: int, num_blocks: int
) -> None:
    prefills = Prefills(num_blocks=num_blocks, budget=budget)
    for now in range(2000):
        for number, (at, num_tokens) in enumerate(arrivals):
            if at == now:
                prefills.add(str(number), num_tokens)
        left = prefills.scheduler.num_queued_tokens
        given_tokens = prefills.step()
        assert sum(given_tokens.values()) <= budget
        if sum(given_tokens.values()) < budget and left:
            assert given_tokens
            assert prefills.scheduler.num_running == 0
        if now > 20 and not left:
            break
    assert sorted(prefills.done) == sorted(str(number) for number in range(len(arrivals)))
    assert prefills.scheduler.num_running == prefills.scheduler.num_waiting == 0
    assert prefills.engine.pool.num_free_blocks == num_blocks


def test_a_low_priority_prompt_gets_leftovers_and_an_occasional_step() -> None:
    prefills = Prefills(budget=8)
    prefills.add("low", 40, priority=1)
    prefills.add("high", 56)
    given = [prefills.step() for _ in range(FLOOR)]
    assert given[:-1] == [{"high": 8}] * (FLOOR - 1)
    assert given[-1] == {"low": 8}
