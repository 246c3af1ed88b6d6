"""Sequences that follow a grammar wait for their masks, hold up no other sequence, and end when a mask is
unavailable."""

import msgspec
import pytest

from pdserve.core.failures import FailureKind
from pdserve.core.messages import LegEnded, Prefill, Serve
from pdserve.core.request import SequenceSpec

from .chain_model import expected_tokens, spec
from .test_roles import WorkerPair


def constrained(name: str, length: int, max_tokens: int = 6, *, n: int = 1) -> SequenceSpec:
    return spec(name, range(length), max_tokens, n=n, grammar="g")


def fail_masks(pair: WorkerPair, kind: FailureKind) -> None:
    """Simulates the worker's reaction when the grammar process gives up an output."""
    for port, masks, role in (
        (pair.p_port, pair.p_masks, pair.prefill),
        (pair.d_port, pair.d_masks, pair.decode),
    ):
        for key in port.due:
            transfer = masks.given_up(key)
            if transfer is not None:
                role.fail(transfer, "no mask", kind)
        port.due.clear()


def test_all_but_a_prompts_last_token_are_computed_before_its_mask() -> None:
    pair, request = WorkerPair(budget=16), constrained("a", 10)
    pair.prefill.prefill(Prefill(spec=request, target=None))
    assert pair.prefill.step()
    assert pair.p_box.timings[-1].num_prefill_tokens == 9
    assert not pair.prefill.step()
    pair.p_port.deliver(pair.rng, pair.p_masks)
    assert pair.prefill.step()
    assert [output.token_id for output in pair.p_box.outputs] == expected_tokens(range(10), 0, 1)


def test_a_sequence_that_waits_for_a_mask_holds_up_no_other() -> None:
    pair, waiting, other = WorkerPair(), constrained("waiting", 5), spec("other", range(7), 9)
    pair.decode.serve(Serve(spec=waiting))
    pair.decode.serve(Serve(spec=other))
    while pair.decode.step():
        pass
    assert pair.tokens(other) == expected_tokens(range(7), 0, 9)
    assert pair.tokens(waiting) == []
    pair.run()
    assert pair.tokens(waiting) == expected_tokens(range(5), 0, 6)
    pair.check_at_rest()


def test_a_prompt_of_one_token_waits_too() -> None:
    pair, request = WorkerPair(), constrained("a", 1)
    pair.decode.serve(Serve(spec=request))
    assert not pair.decode.step()
    pair.run()
    assert pair.tokens(request) == expected_tokens(range(1), 0, 6)


def test_a_mask_in_time_is_used_and_a_late_one_costs_a_step() -> None:
    pair, request = WorkerPair(), constrained("a", 3, 3)
    pair.decode.serve(Serve(spec=request))
    pair.d_port.deliver(pair.rng, pair.d_masks)
    pair.decode.step()
    pair.rng.randrange = lambda *_: 0  # none arrives
    assert pair.decode.step() and len(pair.d_box.outputs) == 1
    assert not pair.decode.step()
    pair.d_port.deliver(pair.rng, pair.d_masks)
    assert pair.decode.step() and len(pair.d_box.outputs) == 2
    pair.run()
    assert pair.tokens(request) == expected_tokens(range(3), 0, 3)
    assert [timing.num_context_tokens for timing in pair.d_box.timings] == [0, 4, 4, 5]
    pair.check_at_rest()


@pytest.mark.parametrize("n", [1, 3])
def test_each_choice_follows_the_grammar_by_itself(n: int) -> None:
    pair, request = WorkerPair(), constrained("a", 10, n=n)
    pair.submit(request)
    pair.run()
    for choice in range(n):
        assert pair.tokens(request, choice) == expected_tokens(range(10), choice, 6)
    pair.check_at_rest()


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.INVALID])
@pytest.mark.parametrize("ticks", range(10))
@pytest.mark.parametrize("both", [False, True])
def test_a_leg_without_a_mask_ends_with_the_reason_and_leaves_nothing(
    ticks: int, kind: FailureKind, both: bool
) -> None:
    pair, request = WorkerPair(seed=ticks), constrained("a", 10, 30, n=2)
    if both:
        pair.decode.serve(Serve(spec=request))
    else:
        pair.submit(request)
    for _ in range(ticks):
        pair.tick()
    had_due = bool(pair.p_port.due or pair.d_port.due)
    fail_masks(pair, kind)
    if had_due:  # as the router does when it is informed
        pair.prefill.abort(request.transfer)
        pair.decode.abort(request.transfer)
    pair.run()
    pair.check_at_rest()
    failed = [leg for leg in (*pair.p_box.ended, *pair.d_box.ended) if is_no_mask(leg)]
    assert len(failed) == had_due
    assert all(leg.kind is kind for leg in failed)


def is_no_mask(leg: LegEnded) -> bool:
    return leg.error == "no mask"


def test_an_output_that_its_grammar_ends_ends_before_min_tokens() -> None:
    eos = expected_tokens(range(10), 0, 3)[2]
    request = spec("a", range(10), 30, grammar="g", eos=eos)
    request = msgspec.structs.replace(
        request, sampling=msgspec.structs.replace(request.sampling, min_tokens=20)
    )
    pair = WorkerPair()
    pair.submit(request)
    pair.run()
    assert pair.tokens(request) == expected_tokens(range(10), 0, 30, eos)
    pair.check_at_rest()
