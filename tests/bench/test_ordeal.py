"""What `bench/chaos.py` counts as lost or altered, and which accident it holds to be the cause."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))

from ordeal.accidents import Accident, Victim
from ordeal.account import Account
from ordeal.streams import Stream, Template

from pdserve.proto import pdserve_pb2 as pb

TEMPLATE = Template((1, 2, 3), {"max_tokens": 3})
CHOICE_END = pb.GenerateEvent(choice_end=pb.ChoiceEnd(finish_reason=pb.FINISH_REASON_LENGTH))
END = pb.GenerateEvent(end=pb.RequestEnd())


def tokens(index: int, *token_ids: int) -> pb.GenerateEvent:
    return pb.GenerateEvent(tokens=pb.TokenDelta(index=index, token_ids=token_ids, text="x" * len(token_ids)))


def stream(*events: pb.GenerateEvent) -> Stream:
    taken = Stream(TEMPLATE, start_s=0.0)
    for event in events:
        taken.take(event)
    return taken


UNDISTURBED = stream(tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END)


def test_the_same_tokens_in_other_pieces_are_the_same_stream() -> None:
    assert stream(tokens(0, 7, 8), tokens(2, 9), CHOICE_END, END).outcome(UNDISTURBED) == "whole"


@pytest.mark.parametrize(
    "events",
    [
        [tokens(0, 7), tokens(2, 9), CHOICE_END, END],  # a gap
        [tokens(0, 7), tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END],  # a repetition
        [tokens(0, 7, 8, 6), CHOICE_END, END],  # another token
        [tokens(0, 7, 8), CHOICE_END, END],  # too few
        [tokens(0, 7, 8, 9), CHOICE_END, CHOICE_END, END],  # two endings
        [tokens(0, 7, 8, 9), END],  # no ending of the choice
        [tokens(0, 7, 8, 9), CHOICE_END, END, END],
    ],
)
def test_any_difference_is_an_altered_stream(events: list[pb.GenerateEvent]) -> None:
    assert stream(*events).outcome(UNDISTURBED) == "altered"


def test_a_stream_without_its_end_is_lost() -> None:
    assert stream(tokens(0, 7, 8, 9), CHOICE_END).outcome(UNDISTURBED) == "lost"


def test_a_resumption_is_measured_from_the_accident_to_the_next_token() -> None:
    """Two tokens had come when the decode worker was killed; the third is the first of the second attempt."""
    resumed = stream(tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END)
    resumed.choices[0].arrivals_s = [1.0, 1.1, 2.5]
    attempts = [
        pb.Attempt(attempt=0, choices=[0], queued_s=0.0, prefill=pb.PrefillLeg(worker="prefill-0", num_tokens=3)),
        pb.Attempt(attempt=1, choices=[0], queued_s=2.1, prefill=pb.PrefillLeg(worker="prefill-1", num_tokens=5)),
    ]
    attempts[0].decode.worker = "decode-0"
    resumed.attempts = attempts
    kill = Accident("kill", "decode", "mid decode", is_whole_pool=False, duration_s=0.0, delay_s=0.0, progress=0.5)
    kill.at_s, kill.victims = 2.0, [Victim("decode-0", 1)]
    account = Account()
    assert account.add_round([kill], [resumed], [UNDISTURBED]) == []
    assert account.resumed_s == {"kill, decode": [0.5]}
    assert account.hits == {"in decode": 1}
