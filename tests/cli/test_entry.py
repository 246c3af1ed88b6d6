"""The command as a process: what ends it early, and how."""

import os
import signal
import subprocess
import sys

import pytest

from pdserve.cli.ending import ending_at_once

COMMAND = "from pdserve.cli.entry import main; main()"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.getcwd()}
ENDING = """
import signal, sys
from pdserve.cli.ending import ending_at_once
with ending_at_once() as clean_ups:
    clean_ups.append(lambda: print("first in, last out", flush=True))
    clean_ups.append(lambda: print("last in", flush=True))
    print("begun", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("arguments", [["plan", "-o", "json"], ["simulate", "--seed", "1"], ["--help"]])
def test_a_reader_that_leaves_ends_a_command_without_a_word(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )
    assert ended.stderr == b""
    assert ended.returncode in (1, 128 + signal.SIGPIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_after_its_clean_ups(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        output, errors = process.communicate()
    assert (output, errors) == ("last in\nfirst in, last out\n", "interrupted\n")
    assert process.returncode == 128 + number


def test_the_handlers_from_before_are_back_behind_the_block() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ending_at_once():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
