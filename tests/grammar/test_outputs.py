"""What was asked of a grammar process survives its deaths: every question is answered once, in order; blame falls on one."""

import itertools
from collections import deque

from hypothesis import given, settings, strategies as st

from pdserve.grammar.messages import Advance, Close, FromProcess, Mask, Open, Refused, ToProcess
from pdserve.grammar.outputs import MAX_DEATHS, Outputs

BAD = "dies of it"


class Model:
    """A process that knows what it was told, and answers in order."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.due: deque[FromProcess] = deque()
        self.is_alive = True

    def take(self, message: ToProcess | None) -> None:
        match message:
            case Open(key=key, token_ids=tokens):
                self.tokens[key] = list(tokens)
                self.due.append(Mask(key, len(tokens), b""))
            case Advance(key=key, num_tokens=num_tokens, token_id=token_id):
                self.tokens[key].append(token_id)
                assert len(self.tokens[key]) == num_tokens
                self.due.append(Mask(key, num_tokens, b""))
            case Close(key=key):
                del self.tokens[key]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["open", "advance", "close", "answer", "die"]), st.integers(0, 5)), max_size=60))
def test_every_output_is_told_each_of_its_masks_once_whatever_dies(actions: list[tuple[str, int]]) -> None:
    outputs, process = Outputs(), Model()
    keys = itertools.count()
    told: dict[int, int] = {}  # of live outputs: the tokens that the last mask was told for
    asked: dict[int, int] = {}

    def answer() -> None:
        reply = process.due.popleft()
        if outputs.answered(reply):
            assert isinstance(reply, Mask) and asked[reply.key] == reply.num_tokens == told[reply.key] + 1
            told[reply.key] = reply.num_tokens

    for action, number in actions:
        live = sorted(told)
        key = live[number % len(live)] if live else None
        if action == "open":
            key = next(keys)
            told[key], asked[key] = number - 1, number
            process.take(outputs.open(key, "g", tuple(range(number)), False))
        elif action == "advance" and key is not None and told[key] == asked[key]:
            asked[key] += 1
            process.take(outputs.advance(key, asked[key]))
        elif action == "close" and key is not None:
            del told[key]
            process.take(outputs.close(key))
        elif action == "answer" and process.due:
            answer()
        elif action == "die":
            given_up = outputs.died(of_its_job=False)
            if given_up is not None:
                assert given_up == (given_up[0], False)
                del told[given_up[0]]
            process = Model()
            for message in outputs.restarted():
                process.take(message)
    while process.due:
        answer()
    assert not outputs.is_asked
    assert all(told[key] == asked[key] for key in told)


def test_the_output_that_a_process_died_of_is_given_up_and_the_others_are_asked_for_again() -> None:
    outputs = Outputs()
    outputs.open(1, "first", (), False)
    outputs.open(2, BAD, (), False)
    outputs.open(3, "third", (7,), False)
    assert outputs.answered(Mask(1, 0, b""))
    assert outputs.died(of_its_job=True) == (2, True)
    assert outputs.restarted() == [Open(3, "third", (7,))]
    assert outputs.advance(1, 5) == Open(1, "first", (5,))  # nothing of it was due, so it is told when it goes on


def test_who_saw_processes_die_without_a_reason_is_given_up_in_the_end() -> None:
    outputs = Outputs()
    outputs.open(1, "g", (), False)
    for _ in range(MAX_DEATHS - 1):
        assert outputs.died(of_its_job=False) is None
        assert outputs.restarted() == [Open(1, "g", ())]
    assert outputs.died(of_its_job=False) == (1, False)
    assert outputs.restarted() == []


def test_nobody_is_told_of_an_output_that_was_closed() -> None:
    outputs = Outputs()
    outputs.open(1, "g", (), False)
    assert outputs.close(1) == Close(1)
    assert not outputs.answered(Mask(1, 0, b""))
    outputs.open(2, "g", (), False)
    outputs.close(2)
    assert outputs.died(of_its_job=True) is None
    assert outputs.restarted() == []


def test_a_refused_output_is_asked_for_no_more() -> None:
    outputs = Outputs()
    outputs.open(1, "g", (), False)
    assert outputs.answered(Refused(1, "no grammar"))
    assert outputs.advance(1, 5) is None
    assert outputs.close(1) is None
