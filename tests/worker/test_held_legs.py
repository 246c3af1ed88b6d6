"""The legs that a worker remembers for a router that does not know them."""

import msgspec
import pytest
from hypothesis import given, strategies as st

from pdserve.core.messages import HeldLeg, Leg, LegEnded, TokenLogprobs, TokenOutput
from pdserve.core.request import FinishReason, SamplingParams, SequenceSpec, TransferId
from pdserve.worker.held_legs import (
    KEPT_S,
    LEG_TOKENS,
    MAX_FRAME_TOKENS,
    MAX_KEPT_TOKENS,
    HeldLegs,
    in_frames,
)

from .chain_model import spec


class HandSetClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ended(name: str) -> LegEnded:
    return LegEnded(worker_id="decode-0", incarnation=1, transfer=TransferId(name, 0), leg=Leg.DECODE)


def token(name: str, index: int) -> TokenOutput:
    return TokenOutput(TransferId(name, 0), 0, index, 7)


def resumed(name: str, num_tokens: int) -> SequenceSpec:
    return msgspec.structs.replace(spec(name, range(4)), output_token_ids=tuple(range(num_tokens)))


def test_an_ended_leg_is_reported_with_all_tokens_for_a_while() -> None:
    clock = HandSetClock()
    legs = HeldLegs(clock)
    legs.accepted(spec("a", range(4)), Leg.DECODE, has_partner=True)
    legs.record([token("a", 0)], [])
    legs.record([token("a", 1)], [ended("a")])
    (leg,) = legs.all()
    assert [output.index for output in leg.outputs()] == [0, 1]
    assert leg.ended == ended("a")
    clock.now_s = KEPT_S + 1.0
    assert legs.all() == ()


def test_log_probabilities_of_prompts_count_towards_the_limit() -> None:
    legs = HeldLegs(HandSetClock())
    prompt = (TokenLogprobs(-1.0, ((1, -1.0), (2, -2.0))),) * (MAX_KEPT_TOKENS // 6)
    for name in ("a", "b", "c"):
        legs.accepted(spec(name, range(4)), Leg.DECODE, has_partner=False)
        legs.record([TokenOutput(TransferId(name, 0), 0, 0, 7, prompt_logprobs=prompt)], [ended(name)])
    (leg,) = legs.all()
    assert leg.spec.transfer.request_id == "c"
    assert leg.outputs()[0].prompt_logprobs == prompt


def test_remembered_ended_legs_are_bounded() -> None:
    legs = HeldLegs(HandSetClock())
    for number in range(5):
        legs.accepted(spec(f"{number}", range(MAX_KEPT_TOKENS // 4)), Leg.DECODE, has_partner=False)
        legs.record([token(f"{number}", 0)], [ended(f"{number}")])
    assert [leg.spec.transfer.request_id for leg in legs.all()] == ["2", "3", "4"]


def test_all_held_legs_are_reported_in_order_across_frames() -> None:
    legs = HeldLegs(HandSetClock())
    for number in range(7):
        legs.accepted(resumed(f"{number}", MAX_FRAME_TOKENS // 3 - LEG_TOKENS), Leg.DECODE, has_partner=False)
    legs.accepted(resumed("long", 2 * MAX_FRAME_TOKENS), Leg.DECODE, has_partner=False)
    frames = list(in_frames(legs.all()))
    assert [len(frame) for frame in frames] == [3, 3, 1, 1]
    assert [leg for frame in frames for leg in frame] == list(legs.all())
    assert list(in_frames(())) == [()]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9), st.booleans(), st.booleans()), max_size=12))
def test_a_held_leg_has_its_outputs_in_their_order_on_the_wire_too(
    drawn: list[tuple[int, int, bool, bool]],
) -> None:
    transfer = TransferId("r", 1)
    spec = SequenceSpec(transfer=transfer, prompt_token_ids=(1,), sampling=SamplingParams())
    outputs = tuple(
        TokenOutput(
            transfer,
            choice,
            index if is_odd else place,
            100 + index,
            logprob=-1.0 if is_scored else None,
            finish_reason=FinishReason.STOP if index == 9 else None,
        )
        for place, (choice, index, is_odd, is_scored) in enumerate(drawn)
    )
    leg = HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(leg), type=HeldLeg)
    assert tuple(received.outputs()) == outputs and received.num_outputs == len(outputs)


def test_plain_tokens_travel_as_numbers_alone() -> None:
    transfer = TransferId("r", 1)
    spec = SequenceSpec(transfer=transfer, prompt_token_ids=(1,), sampling=SamplingParams())
    outputs = [TokenOutput(transfer, 0, index, index) for index in range(5, 9)]
    leg = HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False)
    assert (leg.first_index, leg.token_ids.tolist(), leg.later_outputs) == (5, [5, 6, 7, 8], ())


def test_half_a_token_is_refused_with_its_field() -> None:
    leg = HeldLeg.of(spec("a", range(4)), Leg.DECODE, [token("a", 0)], has_partner=False)
    sent = msgspec.to_builtins(leg, builtin_types=(bytes,))
    sent["packed_tokens"] = b"123"
    with pytest.raises(msgspec.ValidationError, match="packed_tokens: 3 bytes, expected 4 for each token"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=HeldLeg)
