"""With a runner that runs ahead, the decode role launches the next step before it knows the tokens of the
current one."""

import pytest

from pdserve.core.messages import Serve
from pdserve.core.request import FinishReason
from pdserve.engine.batch import Batch, CompletedStep

from .ahead_engine import AheadEngine
from .chain_model import expected_tokens, spec
from .test_roles import WorkerPair


def ahead_pair(seed: int = 0, **sizes: int) -> WorkerPair:
    return WorkerPair(seed, engine=AheadEngine, **sizes)


def engine_of(pair: WorkerPair) -> AheadEngine:
    assert isinstance(pair.d, AheadEngine)
    return pair.d


def drain(pair: WorkerPair) -> None:
    while pair.decode.step():
        pass


def test_the_next_step_is_launched_before_the_current_tokens_are_known() -> None:
    pair, request = ahead_pair(), spec("a", range(4), 9)
    pair.decode.serve(Serve(spec=request))
    assert pair.decode.step()
    assert not pair.d_box.outputs and len(engine_of(pair).queue) == 1
    for num_reported in range(1, 5):
        assert pair.decode.step()
        assert len(pair.d_box.outputs) == num_reported and len(engine_of(pair).queue) == 1
    drain(pair)
    assert pair.tokens(request) == expected_tokens(range(4), 0, 9)
    pair.check_at_rest()


def test_an_ended_stream_wastes_one_row_and_keeps_blocks_meanwhile() -> None:
    eos = expected_tokens(range(4), 0, 3)[2]
    pair, request = ahead_pair(), spec("a", range(4), 20, eos=eos)
    pair.decode.serve(Serve(spec=request))
    while not pair.d_box.outputs or pair.d_box.outputs[-1].finish_reason is None:
        assert pair.decode.step()
    assert pair.d.pool.num_free_blocks < pair.d.num_blocks
    assert pair.decode.step()
    assert len(pair.d_box.ended) == 1
    assert not pair.decode.step()
    assert pair.tokens(request) == expected_tokens(range(4), 0, 20, eos)
    assert engine_of(pair).num_rows == [1] * 4
    pair.check_at_rest()


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_stream_ended_by_its_length_wastes_no_row(max_tokens: int) -> None:
    pair, request = ahead_pair(), spec("a", range(4), max_tokens)
    pair.decode.serve(Serve(spec=request))
    drain(pair)
    assert engine_of(pair).num_rows == [1] * max_tokens
    assert pair.d_box.outputs[-1].finish_reason is FinishReason.LENGTH
    assert pair.tokens(request) == expected_tokens(range(4), 0, max_tokens)
    pair.check_at_rest()


def test_an_ending_sequence_leaves_the_others_ahead() -> None:
    long, short = spec("long", range(4), 12), spec("short", range(5, 9), 3)
    pair = ahead_pair()
    for request in (long, short):
        pair.decode.serve(Serve(spec=request))
    drain(pair)
    assert pair.tokens(long) == expected_tokens(range(4), 0, 12)
    assert pair.tokens(short) == expected_tokens(range(5, 9), 0, 3)
    assert engine_of(pair).num_rows == [2] * 3 + [1] * 9
    pair.check_at_rest()


@pytest.mark.parametrize("steps", range(1, 5))
def test_an_abort_waits_for_the_step_under_way_and_then_frees_everything(steps: int) -> None:
    pair, request, other = ahead_pair(), spec("a", range(4), 4), spec("other", range(9), 8)
    pair.decode.serve(Serve(spec=request))
    pair.decode.serve(Serve(spec=other))
    for _ in range(steps):
        pair.decode.step()
    pair.decode.abort(request.transfer)
    assert not engine_of(pair).queue
    assert [leg.transfer for leg in pair.d_box.ended] == [request.transfer]
    drain(pair)
    assert pair.tokens(request) == expected_tokens(range(4), 0, 4)[:steps]
    assert pair.tokens(other) == expected_tokens(range(9), 0, 8)
    pair.check_at_rest()


def test_no_sequence_is_preempted_while_a_step_is_under_way() -> None:
    pair = ahead_pair(decode_blocks=17)
    requests = [spec(f"r{i}", range(i, i + 8), 40) for i in range(4)]
    for request in requests:
        pair.decode.serve(Serve(spec=request))
    drain(pair)
    assert pair.decode.scheduler.num_preemptions > 0
    for request in requests:
        assert pair.tokens(request) == expected_tokens(request.prompt_token_ids, 0, 40)
    pair.check_at_rest()


def test_steps_do_not_run_ahead_while_an_output_follows_a_grammar() -> None:
    pair, free, bound = ahead_pair(), spec("free", range(4), 12), spec("bound", range(5), 3, grammar="g")
    pair.decode.serve(Serve(spec=free))
    pair.decode.step()
    pair.decode.serve(Serve(spec=bound))
    pair.run()
    assert pair.tokens(free) == expected_tokens(range(4), 0, 12)
    assert pair.tokens(bound) == expected_tokens(range(5), 0, 3)
    pair.check_at_rest()


def test_choices_part_when_their_first_tokens_are_known() -> None:
    pair, request = ahead_pair(), spec("a", range(10), 6, n=3)
    pair.decode.serve(Serve(spec=request))
    pair.decode.step()
    assert pair.decode.step()
    assert len(pair.d_box.outputs) == 3, "the fork was not waited for"
    assert pair.decode.step()
    drain(pair)
    for choice in range(3):
        assert pair.tokens(request, choice) == expected_tokens(range(10), choice, 6)
    pair.check_at_rest()


def test_chunks_of_a_long_prompt_do_not_wait_for_each_other() -> None:
    pair, request = ahead_pair(budget=8), spec("a", range(33), 3)
    pair.decode.serve(Serve(spec=request))
    for _ in range(6):
        pair.decode.step()
        assert len(engine_of(pair).queue) == 1
    drain(pair)
    assert pair.tokens(request) == expected_tokens(range(33), 0, 3)
    pair.check_at_rest()


def test_a_step_completed_at_launch_is_collected_at_once() -> None:
    pair, request = WorkerPair(), spec("a", range(4), 3)
    pair.decode.serve(Serve(spec=request))
    for num_reported in range(1, 4):
        assert pair.decode.step() and len(pair.d_box.outputs) == num_reported
    assert not pair.decode.step()
    assert isinstance(pair.d.launch(Batch(())), CompletedStep)


def test_steps_do_not_run_ahead_of_more_choices_than_rows() -> None:
    """A device keeps the tokens of only that many rows."""
    pair, request = ahead_pair(), spec("many", range(4), 5, n=12)  # on a worker with 8
    pair.decode.serve(Serve(spec=request))
    while pair.decode.step():
        assert len(engine_of(pair).queue) == 0 or pair.decode.scheduler.num_running <= 8
    assert [pair.tokens(request, choice) for choice in range(12)] == [
        expected_tokens(range(4), c, 5) for c in range(12)
    ]
    pair.check_at_rest()


def test_all_choices_of_a_request_count_before_they_are_forked() -> None:
    pair = ahead_pair()
    requests = [spec("many", range(4), 5, n=4), *(spec(f"{n}", range(n, n + 3), 5) for n in range(6))]
    for request in requests:
        pair.decode.serve(Serve(spec=request))
    while pair.decode.step():
        assert pair.decode.scheduler.num_running <= 8
    pair.check_at_rest()
