"""A terminal shows progress during long operations, and one line when they are interrupted."""

import os
import signal
import subprocess
import sys

import pytest

from pdserve.cli.screen import Screen

ENVIRONMENT = os.environ | {"PYTHONPATH": os.getcwd()}
MOVING = """
import signal, sys
from pdserve.cli.ending import ending_at_once
from pdserve.cli.screen import Screen
with ending_at_once() as clean_ups, Screen(print) as screen:
    clean_ups.append(screen.abandon)
    screen.begin("starting Ray")
    screen.write("a line of the log\\n")
    signal.pause()
"""


def read_until(terminal: int, wanted: bytes, shown: bytes = b"") -> bytes:
    while wanted not in shown:
        shown += os.read(terminal, 4096)
    return shown


def lines_of(shown: bytes) -> list[str]:
    """Returns what a terminal shows at last: each line as it was after its last clearing."""
    return [
        line.rsplit("\r\x1b[K", 1)[-1].removeprefix("\x1b[?25h").strip()
        for line in shown.decode().split("\r\n")
    ]


def test_a_terminal_shows_progress_below_the_log_until_interrupted() -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-c", MOVING], stderr=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        shown = read_until(ours, b"/ starting Ray (0 s)", read_until(ours, b"a line of the log"))
        process.send_signal(signal.SIGINT)
        shown = read_until(ours, b"interrupted\r\n", shown)
    os.close(ours)
    assert process.returncode == 128 + signal.SIGINT
    assert lines_of(shown) == ["a line of the log", "interrupted", ""]


def test_without_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with Screen(said.append) as screen:
        screen.begin("starting Ray")
        screen.write("a line of the log\n")
        screen.begin("starting the head")
    assert said == ["starting Ray", "starting the head"]
    assert capsys.readouterr().err == "a line of the log\n"
