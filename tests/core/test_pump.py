"""The loop that executes commands: order, re-entrance, and the state after an error."""

import pytest

from pdserve.core.pump import CommandPump


def test_commands_of_a_nested_event_follow_those_decided_before() -> None:
    done: list[str] = []

    def carry_out(command: str) -> None:
        done.append(command)
        if command == "a":
            assert not pump.run(["c", "d"])
        if command == "c":
            assert not pump.run(["e"])

    pump: CommandPump[str] = CommandPump(carry_out)
    assert pump.run(["a", "b"])
    assert done == ["a", "b", "c", "d", "e"]


def test_more_is_asked_for_only_when_nothing_is_left() -> None:
    done: list[str] = []
    more = [["more"], ["last"], []]

    def refill() -> list[str]:
        done.append("asked")
        return more.pop(0)

    CommandPump(done.append, refill).run(["a", "b"])
    assert done == ["a", "b", "asked", "more", "asked", "last", "asked"]


def test_an_error_leaves_the_commands_behind_it_to_the_next_call() -> None:
    done: list[str] = []

    def carry_out(command: str) -> None:
        if command == "bad":
            raise OSError("bad")
        done.append(command)

    pump: CommandPump[str] = CommandPump(carry_out)
    with pytest.raises(OSError):
        pump.run(["a", "bad", "b"])
    assert pump.run(["c"])
    assert done == ["a", "b", "c"]
