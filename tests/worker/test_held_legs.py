"""The legs that a worker remembers for a router that does not know them."""

from pdserve.core.messages import Leg, LegEnded, TokenLogprobs, TokenOutput
from pdserve.core.request import TransferId
from pdserve.worker.held_legs import KEPT_S, MAX_FRAME_TOKENS, MAX_KEPT_TOKENS, HeldLegs, in_frames

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


def test_an_ended_leg_is_reported_with_all_tokens_for_a_while() -> None:
    clock = HandSetClock()
    legs = HeldLegs(clock)
    legs.accepted(spec("a", range(4)), Leg.DECODE, has_partner=True)
    legs.record([token("a", 0)], [])
    legs.record([token("a", 1)], [ended("a")])
    (leg,) = legs.all()
    assert [output.index for output in leg.outputs] == [0, 1]
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
    assert leg.outputs[0].prompt_logprobs == prompt


def test_remembered_ended_legs_are_bounded() -> None:
    legs = HeldLegs(HandSetClock())
    for number in range(5):
        legs.accepted(spec(f"{number}", range(MAX_KEPT_TOKENS // 4)), Leg.DECODE, has_partner=False)
        legs.record([token(f"{number}", 0)], [ended(f"{number}")])
    assert [leg.spec.transfer.request_id for leg in legs.all()] == ["2", "3", "4"]


def test_all_held_legs_are_reported_in_order_across_frames() -> None:
    legs = HeldLegs(HandSetClock())
    for number in range(7):
        legs.accepted(spec(f"{number}", range(MAX_FRAME_TOKENS // 3)), Leg.DECODE, has_partner=False)
    legs.accepted(spec("long", range(2 * MAX_FRAME_TOKENS)), Leg.DECODE, has_partner=False)
    frames = list(in_frames(legs.all()))
    assert [len(frame) for frame in frames] == [3, 3, 1, 1]
    assert [leg for frame in frames for leg in frame] == list(legs.all())
    assert list(in_frames(())) == [()]
