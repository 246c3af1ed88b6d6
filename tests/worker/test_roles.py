"""The two roles over a modelled engine and wire: every stream carries exactly the tokens that its KV
implies."""

import random
from collections.abc import Callable, Sequence as Seq

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from pdserve.core.messages import Leg, Prefill, Reserve, Serve
from pdserve.core.request import FinishReason, SequenceSpec, TransferId
from pdserve.decode_worker import scheduler as scheduler_module
from pdserve.decode_worker.worker import DecodeWorker
from pdserve.engine.batch import RoleEngine
from pdserve.engine.outbox import LegClock, Outbox
from pdserve.engine.sequence import Sequence
from pdserve.engine.token_masks import TokenMasks
from pdserve.prefill_worker.worker import PrefillWorker

from .ahead_engine import AheadEngine
from .chain_model import ChainEngine, LateMasks, Wire, expected_tokens, spec


class WorkerPair:
    """A prefill worker and a decode worker, driven step by step in an order drawn by the seed."""

    def __init__(
        self,
        seed: int = 0,
        *,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        budget: int = 16,
        max_batch_size: int = 8,
        engine: type[ChainEngine] = ChainEngine,
    ) -> None:
        self.rng = random.Random(seed)
        self.p, self.d = engine(prefill_blocks), engine(decode_blocks)
        self.wire = Wire(self.p, self.d, self.rng)
        self.p_box, self.d_box = Outbox("prefill-0", 1), Outbox("decode-0", 1)
        self.p_port, self.d_port = LateMasks(), LateMasks()
        self.p_masks, self.d_masks = TokenMasks(self.p_port), TokenMasks(self.d_port)
        self.prefill = PrefillWorker(
            RoleEngine(self.p.kv, self.p, 1, budget, 8), self.wire, self.p_box, self.p_masks
        )
        self.decode = DecodeWorker(
            RoleEngine(self.d.kv, self.d, 1, budget, max_batch_size),
            self.wire,
            self.d_box,
            self.d_masks,
            self.await_masks,
        )

    def await_masks(self, sequences: Seq[Sequence]) -> None:
        """Delivers some masks in time, others late."""
        for _ in range(self.rng.randrange(3)):
            self.d_port.deliver(self.rng, self.d_masks)

    def submit(self, spec: SequenceSpec) -> None:
        self.decode.reserve(Reserve(spec=spec, source_worker_id="prefill-0", source_incarnation=1))
        self.prefill.prefill(Prefill(spec=spec, target=self.wire.address))

    def tick(self) -> bool:
        actions: list[Callable[[], bool]] = [
            self.prefill.step,
            self.decode.step,
            lambda: self.wire.deliver(self.prefill, self.decode),
            lambda: self.p_port.deliver(self.rng, self.p_masks),
            lambda: self.d_port.deliver(self.rng, self.d_masks),
        ]
        self.rng.shuffle(actions)
        outcomes = [action() for action in actions]  # all of them, whatever the first returns
        return any(outcomes)

    def run(self) -> None:
        for _ in range(10_000):
            if not self.tick():
                return
        raise AssertionError("the workers never came to rest")

    def tokens(self, spec: SequenceSpec, choice: int = 0) -> list[int]:
        """Returns the choice's tokens by index; each worker must have emitted each index once, and both the
        same first token."""
        ours = [
            [output for output in box.outputs if output.transfer == spec.transfer and output.choice == choice]
            for box in (self.p_box, self.d_box)
        ]
        prefilled, decoded = (sorted(outputs, key=lambda output: output.index) for outputs in ours)
        assert not decoded or not prefilled or decoded[0] == prefilled[0]
        outputs = decoded or prefilled
        first = len(spec.output_token_ids)
        assert [output.index for output in outputs] == list(range(first, first + len(outputs)))
        assert all(output.finish_reason is None for output in outputs[:-1])
        return [output.token_id for output in outputs]

    def check_at_rest(self) -> None:
        assert self.prefill.num_legs == self.decode.num_legs == 0
        assert not self.p_port.num_tokens and not self.d_port.num_tokens, (
            "outputs that the grammar process still follows"
        )
        for engine in (self.p, self.d):
            engine.pool.check_integrity()
            assert engine.pool.num_free_blocks == engine.num_blocks


def test_a_request_is_prefilled_on_one_worker_and_decoded_on_the_other() -> None:
    pair, request = WorkerPair(), spec("a", range(10), max_tokens=6)
    pair.submit(request)
    pair.run()
    assert pair.tokens(request) == expected_tokens(range(10), 0, 6)
    assert [output.index for output in pair.p_box.outputs] == [0]
    assert [output.index for output in pair.d_box.outputs] == [0, 1, 2, 3, 4, 5]
    assert pair.d_box.outputs[-1].finish_reason is FinishReason.LENGTH
    pair.check_at_rest()


def test_each_leg_ends_once_and_without_an_error() -> None:
    pair = WorkerPair()
    pair.submit(spec("a", range(10)))
    pair.run()
    ended = [*pair.p_box.ended, *pair.d_box.ended]
    assert [(leg.leg, leg.error) for leg in ended] == [(Leg.PREFILL, None), (Leg.DECODE, None)]
    assert ended[0].stats is not None


def test_the_transfer_is_not_counted_as_prefill_time() -> None:
    clock = LegClock(accepted_s=1.0)
    clock.start(2.0)
    assert clock.durations(5.0) == (1.0, 3.0)
    clock.computed_s = 3.5
    assert clock.durations(9.0) == (1.0, 1.5)


def test_a_prompt_longer_than_the_token_budget_is_prefilled_in_chunks() -> None:
    pair, request = WorkerPair(budget=5), spec("a", range(33), max_tokens=4)
    pair.submit(request)
    pair.run()
    assert [timing.num_prefill_tokens for timing in pair.p_box.timings] == [5] * 6 + [3]
    assert pair.tokens(request) == expected_tokens(range(33), 0, 4)


def test_a_cached_prefix_is_neither_computed_nor_sent_again() -> None:
    pair, first, second = WorkerPair(), spec("a", range(20), 2), spec("b", [*range(17), 90, 91], 2)
    for request in (first, second):
        pair.submit(request)
        pair.run()
    assert pair.p_box.ended[1].num_cached_tokens == pair.d_box.ended[1].num_cached_tokens == 16
    assert pair.tokens(second) == expected_tokens([*range(17), 90, 91], 0, 2)


def test_several_choices_share_one_prefill_and_one_transfer() -> None:
    pair, request = WorkerPair(), spec("a", range(10), 6, n=3)
    pair.submit(request)
    pair.run()
    for choice in range(3):
        assert pair.tokens(request, choice) == expected_tokens(range(10), choice, 6)
    assert len(pair.p_box.timings) == 1
    pair.check_at_rest()


def test_a_request_that_ends_with_its_first_token_leaves_nothing_behind() -> None:
    eos = expected_tokens(range(10), 0, 1)[0]
    pair, request = WorkerPair(), spec("a", range(10), 6, eos=eos)
    pair.submit(request)
    for _ in range(5):
        pair.tick()
    pair.decode.abort(request.transfer)
    pair.run()
    assert pair.tokens(request) == [eos]
    pair.check_at_rest()


def test_one_worker_serves_both_phases() -> None:
    pair, request = WorkerPair(), spec("a", range(30), 6, n=2)
    pair.decode.serve(Serve(spec=request))
    pair.run()
    for choice in range(2):
        assert pair.tokens(request, choice) == expected_tokens(range(30), choice, 6)
    pair.check_at_rest()


def test_a_long_prompt_does_not_hold_up_decoding_sequences() -> None:
    pair = WorkerPair(budget=8)
    pair.decode.serve(Serve(spec=spec("short", range(4), 20)))
    pair.decode.step()
    pair.decode.serve(Serve(spec=spec("long", range(40, 80), 2)))
    for _ in range(5):
        before = len(pair.d_box.outputs)
        pair.decode.step()
        assert len(pair.d_box.outputs) == before + 1


def test_a_resumed_request_continues_where_its_client_is() -> None:
    whole = expected_tokens(range(10), 0, 8)
    pair, request = WorkerPair(), spec("a", range(10), 8, output=whole[:3], attempt=2)
    pair.submit(request)
    pair.run()
    assert pair.tokens(request) == whole[3:]


def test_preempted_sequences_lose_no_token() -> None:
    pair = WorkerPair(decode_blocks=17)
    requests = [spec(f"r{i}", range(i, i + 8), 40) for i in range(4)]
    for request in requests:
        pair.decode.serve(Serve(spec=request))
    pair.run()
    assert pair.decode.scheduler.num_preemptions > 0
    for request in requests:
        assert pair.tokens(request) == expected_tokens(request.prompt_token_ids, 0, 40)
    pair.check_at_rest()


def test_a_client_with_one_sequence_is_not_preempted_for_one_with_many() -> None:
    """Its sequence is the youngest, and there are blocks for two of four."""
    pair = WorkerPair(decode_blocks=30)
    for number in range(3):
        pair.decode.serve(Serve(spec=spec(f"r{number}", range(number, number + 8), 40, client="many")))
    pair.decode.serve(Serve(spec=spec("one", range(50, 58), 40, client="one")))
    scheduler = pair.decode.scheduler
    has_run = False
    while pair.decode.step():
        is_running = any(seq.spec.client == "one" for seq in scheduler._running)
        has_run |= is_running
        assert is_running or not any(seq.spec.client == "one" for seq in scheduler._waiting) or not has_run
    assert has_run and scheduler.num_preemptions > 0


def test_sequences_of_lower_priority_are_preempted_first_and_finish_all_the_same() -> None:
    pair = WorkerPair(decode_blocks=24)
    low = [msgspec.structs.replace(spec(f"low{n}", range(n, n + 8), 30), priority=3) for n in range(3)]
    high = [spec(f"high{n}", range(50 + n, 58 + n), 30) for n in range(2)]
    for request in (*low, *high):
        pair.decode.serve(Serve(spec=request))
    scheduler = pair.decode.scheduler
    while pair.decode.step():
        preempted = [seq for seq in scheduler._waiting if not seq.is_fresh]
        assert all(seq.spec.priority == 3 for seq in preempted)
    assert scheduler.num_preemptions
    for request in (*low, *high):
        assert pair.tokens(request) == expected_tokens(request.prompt_token_ids, 0, 30)
    pair.check_at_rest()


def test_admission_is_by_priority_with_one_in_eight_of_the_lowest() -> None:
    pair = WorkerPair(decode_blocks=200)
    low = [msgspec.structs.replace(spec(f"low{n}", range(4), 2), priority=3) for n in range(2)]
    for request in (*low, *(spec(f"high{n}", range(n, n + 4), 2) for n in range(40))):
        pair.decode.serve(Serve(spec=request))
    while pair.decode.step():
        pass
    ended = [leg.transfer.request_id for leg in pair.d_box.ended]
    assert 0 < ended.index("low0") < ended.index("low1") < 24


def crowded(*, decode_blocks: int, num_sequences: int, max_tokens: int, num_preemptions: int) -> WorkerPair:
    """Returns a pair in which the sequences of client "many" have begun to preempt each other."""
    pair = WorkerPair(decode_blocks=decode_blocks)
    for number in range(num_sequences):
        prompt = range(number, number + 8)
        pair.decode.serve(Serve(spec=spec(f"r{number}", prompt, max_tokens, client="many")))
    while pair.decode.scheduler.num_preemptions < num_preemptions:
        assert pair.decode.step()
    return pair


def test_preempted_sequences_do_not_stand_before_a_client_that_has_none() -> None:
    pair = crowded(decode_blocks=17, num_sequences=4, max_tokens=40, num_preemptions=2)
    scheduler = pair.decode.scheduler
    pair.decode.serve(Serve(spec=spec("one", range(50, 58), 40, client="one")))
    while any(seq.spec.client == "one" for seq in scheduler._waiting):
        before = set(scheduler._running)
        assert pair.decode.step()
        admitted = set(scheduler._running) - before
        assert all(seq.spec.client == "one" for seq in admitted)
    assert any(seq.spec.client == "many" for seq in scheduler._waiting), "it came in its turn, not at the end"


def test_a_client_that_has_nothing_gets_room_from_one_that_has_all() -> None:
    """Running sequences would grow into every block that becomes free."""
    pair = crowded(decode_blocks=24, num_sequences=8, max_tokens=400, num_preemptions=3)
    scheduler = pair.decode.scheduler
    pair.decode.serve(Serve(spec=spec("one", range(50, 58), 4, client="one")))
    assert pair.decode.step()
    assert any(seq.spec.client == "one" for seq in scheduler._running)


def test_a_large_request_takes_no_room_from_clients_that_have_less() -> None:
    pair = WorkerPair(decode_blocks=24)
    for client in ("a", "b", "c"):
        for number in range(2):
            pair.decode.serve(Serve(spec=spec(f"{client}{number}", range(8), 60, client=client)))
    assert pair.decode.step()
    pair.decode.serve(Serve(spec=spec("large", range(60), 4, client="d")))
    assert pair.decode.step()
    assert pair.decode.scheduler.num_preemptions == 0
    pair.run()
    assert len(pair.tokens(spec("large", range(60), 4, client="d"))) == 4


def test_a_small_sequence_passes_a_preempted_one_that_does_not_fit() -> None:
    """Two clients with one long sequence each, of which only one fits at the end."""
    pair = WorkerPair(decode_blocks=24)
    for start, client in enumerate("ab"):
        pair.decode.serve(Serve(spec=spec(client, range(10 * start, 10 * start + 8), 80, client=client)))
    scheduler = pair.decode.scheduler
    while not scheduler.num_preemptions:
        assert pair.decode.step()
    pair.decode.serve(Serve(spec=spec("small", range(30, 34), 4, client="c")))
    assert pair.decode.step()
    assert any(seq.spec.client == "c" for seq in scheduler._running)
    pair.run()
    pair.check_at_rest()


def test_small_sequences_pass_a_large_one_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_PASSES", 3)
    pair = WorkerPair(decode_blocks=24)
    for start, client in enumerate("ab"):
        pair.decode.serve(Serve(spec=spec(client, range(10 * start, 10 * start + 8), 80, client=client)))
    scheduler = pair.decode.scheduler
    while not scheduler.num_preemptions:
        assert pair.decode.step()
    for number in range(6):
        pair.decode.serve(
            Serve(spec=spec(f"small{number}", range(30 + number, 34 + number), 4, client=f"c{number}"))
        )
    for _ in range(3):
        assert pair.decode.step()
    assert sum(seq.spec.client[0] == "c" for seq in scheduler._waiting) == 3
    pair.run()
    pair.check_at_rest()


def test_a_client_with_little_takes_room_from_one_with_much() -> None:
    pair = WorkerPair(decode_blocks=40)
    for number in range(6):
        prompt = range(10 * number, 10 * number + 8)
        pair.decode.serve(Serve(spec=spec(f"r{number}", prompt, 200, client="many")))
    scheduler = pair.decode.scheduler
    while not scheduler.num_preemptions:
        assert pair.decode.step()
    for number in range(2):
        prompt = range(70 + 10 * number, 74 + 10 * number)
        pair.decode.serve(Serve(spec=spec(f"theirs{number}", prompt, 20, client="one")))
        assert pair.decode.step()
    assert sum(seq.spec.client == "one" for seq in scheduler._running) == 2


@pytest.mark.parametrize(("decode_blocks", "max_batch_size"), [(40, 8), (64, 4)])
def test_a_client_with_nothing_takes_room_from_choices_of_one_request(
    decode_blocks: int, max_batch_size: int
) -> None:
    pair = WorkerPair(decode_blocks=decode_blocks, max_batch_size=max_batch_size)
    pair.decode.serve(Serve(spec=spec("theirs", range(8), 40, n=4, client="many")))
    scheduler = pair.decode.scheduler
    for _ in range(36):
        assert pair.decode.step()
    pair.decode.serve(Serve(spec=spec("new", range(30, 38), 20, client="one")))
    assert pair.decode.step()
    assert [seq.spec.client for seq in scheduler._running].count("one") == 1
    pair.run()
    pair.check_at_rest()


@pytest.mark.parametrize("steps", range(12))
def test_an_abort_at_any_point_frees_everything_on_both_workers(steps: int) -> None:
    pair, request = WorkerPair(seed=steps, budget=4), spec("a", range(14), 6, n=2)
    pair.submit(request)
    for _ in range(steps):
        pair.tick()
    pair.prefill.abort(request.transfer)
    pair.decode.abort(request.transfer)
    pair.run()
    pair.check_at_rest()
    assert len(pair.p_box.ended) == len(pair.d_box.ended) == 1


@pytest.mark.parametrize("engine", [ChainEngine, AheadEngine])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("choice", range(3))
@pytest.mark.parametrize("steps", range(14))
def test_aborting_a_choice_leaves_its_siblings_all_their_tokens(
    steps: int, choice: int, both: bool, engine: type[ChainEngine]
) -> None:
    pair, request = WorkerPair(seed=steps, budget=4, engine=engine), spec("a", range(14), 9, n=3)
    pair.decode.serve(Serve(spec=request)) if both else pair.submit(request)
    for _ in range(steps):
        pair.tick()
    pair.decode.abort_choice(request.transfer, choice)
    num_before = len(pair.tokens(request, choice))
    pair.run()
    for other in range(3):
        tokens, expected = pair.tokens(request, other), expected_tokens(range(14), other, 9)
        if other == choice:
            assert tokens == expected[: len(tokens)]
            assert len(tokens) <= max(num_before, 1), "its first token comes with the prompt"
        else:
            assert tokens == expected
    pair.check_at_rest()


def test_an_aborted_choice_frees_its_own_blocks_at_once() -> None:
    pair, request = WorkerPair(), spec("a", range(8), 30, n=2)
    pair.decode.serve(Serve(spec=request))
    for _ in range(12):
        pair.decode.step()
    num_free = pair.d.pool.num_free_blocks
    pair.decode.abort_choice(request.transfer, 0)
    assert pair.d.pool.num_free_blocks == num_free + 3, "12 of its 20 tokens are its own"
    pair.decode.abort_choice(request.transfer, 1)
    assert pair.d.pool.num_free_blocks == pair.d.num_blocks
    assert [ended.error for ended in pair.d_box.ended] == [None]
    pair.check_at_rest()


def test_a_preempted_choice_can_be_aborted() -> None:
    pair, request = WorkerPair(decode_blocks=8), spec("a", range(8), 16, n=3)
    pair.decode.serve(Serve(spec=request))
    scheduler = pair.decode.scheduler
    while not scheduler.num_preemptions:
        pair.decode.step()
    (preempted,) = scheduler._waiting
    pair.decode.abort_choice(request.transfer, preempted.choice)
    assert not scheduler._waiting
    pair.run()
    pair.check_at_rest()


def test_aborting_an_unknown_dispatch_is_ignored() -> None:
    pair = WorkerPair()
    pair.decode.abort_choice(TransferId("nobody", 0), 0)
    pair.prefill.abort(TransferId("nobody", 0))
    pair.decode.abort(TransferId("nobody", 0))
    assert not pair.tick()


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # how the prompt starts: few kinds, so that prefixes are shared
        st.integers(1, 40),  # its length
        st.integers(2, 20),  # max_tokens
        st.integers(1, 3),  # n
        st.booleans(),  # both phases on one worker
        st.integers(0, 60),  # when it arrives
        st.one_of(st.none(), st.integers(0, 60)),  # when it is aborted
        st.booleans(),  # follows a grammar
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(0, 2**32), st.integers(3, 20), st.sampled_from((ChainEngine, AheadEngine)))
def test_any_mix_of_requests_keeps_every_stream_exact(
    mix: list[tuple],  # type: ignore[type-arg]
    seed: int,
    budget: int,
    engine: type[ChainEngine],
) -> None:
    pair = WorkerPair(seed, prefill_blocks=20, decode_blocks=20, budget=budget, engine=engine)
    specs = {}
    for number, (kind, length, max_tokens, n, both, *_, follows) in enumerate(mix):
        prompt = [(kind * 7 + i) % 50 for i in range(length)]
        specs[number] = (spec(f"r{number}", prompt, max_tokens, n=n, grammar="g" if follows else ""), both)
    for now in range(61):
        for number, (*_, arrival, abort, _) in enumerate(mix):
            request, both = specs[number]
            if arrival == now:
                pair.decode.serve(Serve(spec=request)) if both else pair.submit(request)
            if abort == now and abort > arrival:
                pair.prefill.abort(request.transfer)
                pair.decode.abort(request.transfer)
        pair.tick()
    pair.run()
    for number, (*_, arrival, abort, _) in enumerate(mix):
        request, _both = specs[number]
        for choice in request.choices:
            tokens = pair.tokens(request, choice)
            expected = expected_tokens(request.prompt_token_ids, choice, request.sampling.max_tokens)
            whole = abort is None or abort <= arrival
            assert tokens == (expected if whole else expected[: len(tokens)])
    pair.check_at_rest()
