"""`pdserve simulate` prints what it ran, and its exit status shows whether a promise was broken."""

import re
from unittest.mock import patch

from typer.testing import CliRunner

from pdserve.cli.main import app
from pdserve.router.admission import JobQueue


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *args])
    return result.exit_code, result.output


def test_a_range_of_seeds_ends_with_a_summary() -> None:
    status, output = run("--seeds", "5", "--first-seed", "7", "--processes", "1")
    assert status == 0
    assert re.search(r"^seeds that broke a promise +0$", output, re.MULTILINE)


def test_one_seed_prints_its_timeline() -> None:
    status, output = run("--seed", "3")
    assert status == 0
    assert "worker-0/1 connects to the router" in output
    assert "seed 3: " in output


def test_a_broken_promise_is_shown_and_fails_the_command() -> None:
    with patch.object(JobQueue, "unstrand", lambda self: None):
        status, output = run("--seeds", "2", "--processes", "1")
        assert status == 1
        assert "seed 0: " in output
        assert "`pdserve simulate --seed 0` shows the first of them" in output
        status, output = run("--seed", "0")
    assert status == 1
    assert "VIOLATION" in output
