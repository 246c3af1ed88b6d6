"""A state is written only by its automaton, which refuses transitions outside its table and reports its
history."""

import enum

import pytest

from pdserve.core.automaton import MAX_STORY, Automaton
from pdserve.core.errors import InvalidTransition


class Lamp(enum.Enum):
    OFF = "off"
    ON = "on"
    BROKEN = "broken"


TRANSITIONS = {Lamp.OFF: {Lamp.ON}, Lamp.ON: {Lamp.OFF, Lamp.BROKEN}, Lamp.BROKEN: set[Lamp]()}


def test_an_illegal_transition_changes_nothing_and_reports_the_history() -> None:
    lamp = Automaton(TRANSITIONS, Lamp.OFF, name="lamp 7", at_s=0.5)
    lamp.transition(Lamp.ON, 1.0)
    lamp.transition(Lamp.BROKEN, 2.25, "it fell")
    with pytest.raises(InvalidTransition, match="lamp 7") as raised:
        lamp.transition(Lamp.ON, 3.0)
    assert "['off at 0.500 s', 'on at 1.000 s', 'broken at 2.250 s (it fell)']" in str(raised.value)
    assert lamp.state is Lamp.BROKEN


def test_the_story_of_a_long_life_is_its_recent_part() -> None:
    lamp = Automaton(TRANSITIONS, Lamp.OFF)
    for _ in range(MAX_STORY):
        lamp.transition(Lamp.ON)
        lamp.transition(Lamp.OFF)
    assert lamp.story() == ["on", "off"] * (MAX_STORY // 2)
