"""Requests to a grammar process survive its crashes: each is answered once, in order; only one is blamed."""

import itertools
from collections import deque

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.core.codec import FrameError
from pdserve.core.limited_child import Death
from pdserve.grammar.messages import Advance, Close, FromProcess, GrammarRefused, Mask, OpenOutput, ToProcess
from pdserve.grammar.outputs import MAX_DEATHS, WINDOW, WINDOW_EACH, Outputs

BAD = "dies of it"


class ScriptedProcess:
    """A process that keeps the outputs it was sent, and answers in order."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.due: deque[FromProcess] = deque()

    def take(self, message: ToProcess | None) -> None:
        match message:
            case OpenOutput(key=key, token_ids=tokens):
                self.tokens[key] = list(tokens)
                self.due.append(Mask(key, len(tokens), b""))
            case Advance(key=key, num_tokens=num_tokens, token_id=token_id):
                self.tokens[key].append(token_id)
                assert len(self.tokens[key]) == num_tokens
                self.due.append(Mask(key, num_tokens, b""))
            case Close(key=key):
                del self.tokens[key]


CLIENTS = ("a", "b")
Action = tuple[str, int]
ACTIONS = st.tuples(
    st.sampled_from(["open", "advance", "close", "answer", "die", "hand over"]), st.integers(0, 5)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_every_output_gets_each_mask_once_across_crashes(actions: list[Action]) -> None:
    """Two clients, and two processes: what one was asked for a client may go on in the other."""
    outputs, processes = (Outputs(), Outputs()), [ScriptedProcess(), ScriptedProcess()]
    keys = itertools.count()
    side_of: dict[int, int] = {}
    covered: dict[int, int] = {}  # for live outputs: the tokens that the last mask covered
    wanted: dict[int, int] = {}

    def ask() -> None:
        for side in (0, 1):
            for request in outputs[side].requests():
                processes[side].take(request)
            assert len(processes[side].due) <= WINDOW

    def answer(side: int) -> None:
        reply = processes[side].due.popleft()
        if outputs[side].answered(reply):
            assert isinstance(reply, Mask) and wanted[reply.key] == reply.num_tokens == covered[reply.key] + 1
            covered[reply.key] = reply.num_tokens

    for action, number in actions:
        live = sorted(covered)
        key = live[number % len(live)] if live else None
        side = number % 2
        if action == "open":
            key = next(keys)
            covered[key], wanted[key], side_of[key] = number - 1, number, side
            outputs[side].open(key, "g", tuple(range(number)), client=CLIENTS[key % 2])
        elif action == "advance" and key is not None and covered[key] == wanted[key]:
            wanted[key] += 1
            outputs[side_of[key]].advance(key, wanted[key])
        elif action == "close" and key is not None:
            del covered[key]
            processes[side_of[key]].take(outputs[side_of[key]].close(key))
        elif action == "answer" and processes[side].due:
            answer(side)
        elif action == "die":
            given_up = outputs[side].died(Death.OTHER)
            if given_up is not None:
                assert given_up == (given_up[0], False)
                del covered[given_up[0]]
            processes[side] = ScriptedProcess()
        elif action == "hand over":
            moved, messages = outputs[side].hand_over(CLIENTS[number // 2 % 2], outputs[1 - side])
            side_of |= dict.fromkeys(moved, 1 - side)
            for message in messages:
                processes[side].take(message)
        ask()
    while any(process.due for process in processes):
        for side in (0, 1):
            if processes[side].due:
                answer(side)
        ask()
    assert not any(side.is_asked for side in outputs)
    assert all(covered[key] == wanted[key] for key in covered)


def test_only_the_output_that_killed_a_process_is_abandoned() -> None:
    outputs = Outputs()
    outputs.open(1, "first")
    assert outputs.requests() == [OpenOutput(1, "first")]
    assert outputs.answered(Mask(1, 0, b""))
    outputs.open(2, BAD)
    outputs.advance(1, 5)
    outputs.open(3, "third", (7,))
    assert outputs.requests() == [OpenOutput(2, BAD), Advance(1, 1, 5)]
    assert outputs.died(Death.TIME) == (2, True)
    assert outputs.requests() == [OpenOutput(1, "first", (5,))]
    assert outputs.answered(Mask(1, 1, b""))
    assert outputs.requests() == [OpenOutput(3, "third", (7,))]


def test_a_running_stream_waits_for_at_most_one_opening_output() -> None:
    outputs = Outputs()
    outputs.open(0, "stream")
    outputs.requests()
    outputs.answered(Mask(0, 0, b""))
    for key in range(1, 30):
        outputs.open(key, "another")
    outputs.requests()
    outputs.advance(0, 7)
    assert outputs.requests() == [Advance(0, 1, 7)]


def test_an_output_that_was_closed_before_its_turn_is_never_opened() -> None:
    outputs = Outputs()
    outputs.open(1, "first")
    outputs.requests()
    outputs.open(2, "second")
    assert outputs.close(2) is None
    outputs.answered(Mask(1, 0, b""))
    assert outputs.requests() == [] and not outputs.is_asked


@pytest.mark.parametrize(("death", "is_to_blame"), [(Death.OTHER, False), (Death.RESOURCES, True)])
def test_an_output_that_keeps_killing_processes_is_abandoned(death: Death, is_to_blame: bool) -> None:
    outputs = Outputs()
    outputs.open(1, "g")
    for _ in range(MAX_DEATHS - 1):
        assert outputs.requests() == [OpenOutput(1, "g")]
        assert outputs.died(death) is None
    assert outputs.requests() == [OpenOutput(1, "g")]
    assert outputs.died(death) == (1, is_to_blame)
    assert outputs.requests() == []


def test_a_closed_output_gets_no_answers() -> None:
    outputs = Outputs()
    outputs.open(1, "g")
    outputs.requests()
    assert outputs.close(1) == Close(1)
    assert not outputs.answered(Mask(1, 0, b""))
    outputs.open(2, "g")
    outputs.requests()
    outputs.close(2)
    assert outputs.died(Death.TIME) is None
    assert outputs.requests() == []


def test_a_refused_output_is_asked_for_no_more() -> None:
    outputs = Outputs()
    outputs.open(1, "g")
    outputs.requests()
    assert outputs.answered(GrammarRefused(1, "no grammar"))
    outputs.advance(1, 5)
    assert outputs.close(1) is None and outputs.requests() == []


def test_an_answer_that_is_not_due_is_no_answer() -> None:
    outputs = Outputs()
    with pytest.raises(FrameError, match="none was due"):
        outputs.answered(Mask(1, 0, b""))
    outputs.open(1, "g")
    outputs.requests()
    with pytest.raises(FrameError, match="was due"):
        outputs.answered(Mask(2, 0, b""))


def opened(*clients: str) -> Outputs:
    """Opens an output for each, by number, and delivers its first mask."""
    outputs = Outputs()
    for key, client in enumerate(clients):
        outputs.open(key, "g", client=client)
        outputs.requests()
        outputs.answered(Mask(key, 0, b""))
    return outputs


def test_clients_take_turns_with_their_outputs() -> None:
    outputs = opened(*["many"] * 30, "one")
    for key in range(31):
        outputs.advance(key, 7)
    assert Advance(30, 1, 7) in outputs.requests()


def test_no_client_has_all_that_the_process_is_given_at_once() -> None:
    outputs = opened(*["many"] * 30, "one")
    for key in range(30):
        outputs.advance(key, 7)
    assert len(outputs.requests()) == WINDOW_EACH
    outputs.advance(30, 7)
    assert outputs.requests() == [Advance(30, 1, 7)]
    outputs.answered(Mask(0, 1, b""))
    assert outputs.requests() == [Advance(WINDOW_EACH, 1, 7)]


def test_a_newcomer_waits_for_at_most_one_output_of_another_client() -> None:
    outputs = Outputs()
    for key in range(30):
        outputs.open(key, "g", client="many")
    assert outputs.requests() == [OpenOutput(0, "g")]
    outputs.open(30, "g", client="one")
    order = []
    for key in (0, 1):
        outputs.answered(Mask(key, 0, b""))
        order += outputs.requests()
    assert order == [OpenOutput(1, "g"), OpenOutput(30, "g")]


def test_a_clients_outputs_move_to_another_process_and_are_answered_once() -> None:
    """One output in progress, one waiting for its turn and one whose mask has arrived; another client's
    stays."""
    outputs, others = opened("costly", "costly", "other"), Outputs()
    outputs.advance(0, 7)
    outputs.advance(2, 7)
    assert outputs.requests() == [Advance(0, 1, 7), Advance(2, 1, 7)]
    outputs.open(3, "g", client="costly")
    keys, messages = outputs.hand_over("costly", others)
    assert (keys, messages) == ([0, 1, 3], [Close(0), Close(1)])
    assert not outputs.answered(Mask(0, 1, b"")) and outputs.answered(Mask(2, 1, b""))
    assert not outputs.is_asked
    assert others.requests() == [OpenOutput(0, "g", (7,))]
    assert others.answered(Mask(0, 1, b""))
    assert others.requests() == [OpenOutput(3, "g")]
    assert others.answered(Mask(3, 0, b""))
    assert not others.is_asked
    others.advance(1, 7)
    assert others.requests() == [OpenOutput(1, "g", (7,))]
