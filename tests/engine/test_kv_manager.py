"""KVManager: after any admission, growth, fork, preemption or eviction, a sequence reads back its own
tokens."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.request import SamplingParams, SequenceSpec, TransferId
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.kv_manager import KVManager
from pdserve.engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_MODEL_LEN = 40


def make_sequence(tokens: list[int], salt: str = "", name: str = "r") -> Sequence:
    spec = SequenceSpec(
        transfer=TransferId(name, 0),
        prompt_token_ids=tuple(tokens),
        sampling=SamplingParams(max_tokens=1000),
        cache_salt=salt,
    )
    return Sequence(spec, 0, MAX_MODEL_LEN)


class Memory:
    """Models the content of a KV cache: per slot the whole chain of tokens its KV was computed from."""

    def __init__(self, manager: KVManager) -> None:
        self.manager = manager
        self.blocks: list[list[tuple[int, ...] | None]] = [[None] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]

    def step(self, chunks: list[tuple[Sequence, int]]) -> None:
        for source, copy in self.manager.take_copies():
            self.blocks[copy] = list(self.blocks[source])
        for seq, num_tokens in chunks:
            for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
                block_id = seq.block_ids[position // BLOCK_SIZE]
                assert not self.manager.pool.is_cached(block_id), "a cached block is written"
                assert self.manager.pool.ref_count(block_id) == 1, "a shared block is written"
                self.blocks[block_id][position % BLOCK_SIZE] = tuple(seq.token_ids[: position + 1])
        for seq, num_tokens in chunks:
            self.manager.computed(seq, num_tokens)

    def check(self, seq: Sequence) -> None:
        for position in range(seq.num_computed_tokens):
            slot = self.blocks[seq.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            assert slot == tuple(seq.token_ids[: position + 1])


class ManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = KVManager(BlockPool(NUM_BLOCKS, BLOCK_SIZE), MAX_MODEL_LEN)
        self.memory = Memory(self.manager)
        self.running: list[Sequence] = []

    # Few different tokens, so that prefixes repeat.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), use_cache=st.booleans())
    def admit(self, tokens: list[int], use_cache: bool) -> None:
        seq = make_sequence(tokens)
        assert self.manager.admit(seq, use_cache) < seq.num_tokens
        self.running.append(seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        chunks: list[tuple[Sequence, int]] = []
        for seq in data.draw(st.permutations(self.running)):
            num_tokens = data.draw(st.integers(0, seq.num_uncomputed_tokens))
            held, free = list(seq.block_ids), self.manager.pool.num_free_blocks
            if num_tokens == 0:
                continue
            if self.manager.grow(seq, seq.num_computed_tokens + num_tokens):
                chunks.append((seq, num_tokens))
            else:
                assert (seq.block_ids, self.manager.pool.num_free_blocks) == (held, free)
                victim = data.draw(st.sampled_from(self.running))
                chunks = [chunk for chunk in chunks if chunk[0] is not victim]
                self.manager.reset(victim)
                self.manager.admit(victim)
        self.memory.step(chunks)
        for seq in self.running:
            if seq.num_uncomputed_tokens == 0 and seq.num_tokens < MAX_MODEL_LEN:
                seq.append(data.draw(st.integers(0, 1)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.running))
        child = parent.fork(1)
        self.manager.fork(parent, child)
        self.running.append(child)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.manager.release(seq)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        self.manager.pool.check_integrity()
        for seq in self.running:
            self.memory.check(seq)

    def teardown(self) -> None:
        for seq in self.running:
            self.manager.release(seq)
        assert self.manager.pool.num_free_blocks == NUM_BLOCKS
        assert self.manager.take_copies() == ()


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def computed_sequence(manager: KVManager, tokens: list[int], salt: str = "") -> Sequence:
    seq = make_sequence(tokens, salt)
    manager.admit(seq)
    assert manager.grow(seq, seq.num_tokens)
    manager.computed(seq, seq.num_uncomputed_tokens)
    return seq


def new_manager(num_blocks: int = NUM_BLOCKS) -> KVManager:
    return KVManager(BlockPool(num_blocks, BLOCK_SIZE), MAX_MODEL_LEN)


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_repeated_prompt_recomputes_at_least_its_last_token(num_tokens: int, num_cached: int) -> None:
    manager = new_manager()
    tokens = list(range(num_tokens))
    manager.release(computed_sequence(manager, tokens))
    again = make_sequence(tokens)
    assert manager.admit(again) == num_cached
    assert again.num_computed_tokens == again.num_cached_tokens == num_cached
    assert manager.grow(again, num_tokens)
    assert manager.take_copies() == ()


def test_prefixes_are_not_shared_between_salts() -> None:
    manager = new_manager()
    computed_sequence(manager, list(range(9)), salt="a")
    assert manager.admit(make_sequence(list(range(9)), salt="b")) == 0
    assert manager.admit(make_sequence(list(range(9)), salt="a")) == 8


def test_blocks_are_cached_only_once_all_their_tokens_have_kv() -> None:
    manager = new_manager()
    seq = make_sequence(list(range(12)))
    manager.admit(seq)
    assert manager.grow(seq, 12)
    manager.computed(seq, 7)
    assert manager.pool.num_cached_blocks == 1
    manager.received(seq, 12)
    assert manager.pool.num_cached_blocks == 3


def test_only_a_partly_filled_shared_block_is_copied() -> None:
    manager = new_manager()
    parent = computed_sequence(manager, list(range(6)))
    children = [parent.fork(choice) for choice in (1, 2)]
    for child in children:
        manager.fork(parent, child)
    shared = parent.block_ids[1]
    for token_id, seq in enumerate([parent, *children]):
        seq.append(token_id)
        assert manager.grow(seq, 7)
    assert len({seq.block_ids[0] for seq in (parent, *children)}) == 1
    assert len({seq.block_ids[1] for seq in (parent, *children)}) == 3
    assert [source for source, _ in manager.take_copies()] == [shared, shared]
    assert children[1].block_ids[1] == shared  # the last one to write keeps it


def test_a_preempted_choice_discards_its_pending_copy() -> None:
    manager = new_manager()
    parent = computed_sequence(manager, list(range(6)))
    child = parent.fork(1)
    manager.fork(parent, child)
    child.append(0)
    assert manager.grow(child, 7)
    manager.reset(child)
    assert manager.take_copies() == ()
    assert child.num_computed_tokens == 0 and child.token_ids == [*range(6), 0]


def test_growth_beyond_the_pool_is_refused_and_changes_nothing() -> None:
    manager = new_manager(num_blocks=2)
    seq = make_sequence(list(range(12)))
    manager.admit(seq)
    assert not manager.grow(seq, 12)
    assert seq.block_ids == [] and manager.pool.num_free_blocks == 2


def test_the_bookkeeping_needs_no_torch() -> None:
    modules = "block_pool", "kv_manager", "sequence", "batch"
    imports = "; ".join(f"import pdserve.engine.{module}" for module in modules)
    check = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_changed_block_list_is_another_object_unless_it_only_grew() -> None:
    manager = new_manager()
    seq = computed_sequence(manager, list(range(6)))
    held = seq.block_ids
    for token_id in itertools.islice(itertools.count(), 6):
        seq.append(token_id)
    assert manager.grow(seq, 12)
    assert seq.block_ids is held
    manager.reset(seq)
    assert seq.block_ids is not held
