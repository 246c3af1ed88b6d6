"""`pdserve logs` shows what a running or the last cluster has logged, by process, and follows it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli.logs import followed, read
from pdserve.cli.main import app
from pdserve.telemetry import log_file
from pdserve.telemetry.log_file import NUM_KEPT, LogFile

TEXT = (
    "2026-11-30T14:12:48.785 info head head.head: device: cpu",
    "2026-11-30T14:12:48.900 warning worker-0/1 worker.process: it failed\n    | Traceback\n    | OSError",
    "2026-11-30T14:12:49.000 info worker-1/2 kernels.load: kernels: native",
)


@pytest.fixture
def written() -> Iterator[LogFile]:
    """A log that is being written, with lines of three processes."""
    with closing(LogFile()) as log:
        for line in TEXT:
            log.write(line)
        yield log


def logs(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["logs", *arguments])


def ended_run(monkeypatch: pytest.MonkeyPatch, pid: int, address: str) -> None:
    """Leaves the log of another process, as `pdserve up` does."""
    monkeypatch.setattr(os, "getpid", lambda: pid)
    with closing(LogFile()) as log:
        log.publish(address)
        log.write(f"time info head x: run {pid}")
    os.utime(log_file.find(address) or "", (pid, pid))


@pytest.mark.usefixtures("written")
def test_all_lines_are_shown_as_they_were_written() -> None:
    assert logs().stdout == "\n".join((*TEXT, ""))


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["head"], TEXT[:1]),
        (["worker-0"], TEXT[1:2]),
        (["worker-1/2", "head"], (TEXT[0], TEXT[2])),
    ],
)
def test_a_process_is_chosen_by_its_name_with_its_exceptions(
    names: list[str], shown: tuple[str, ...]
) -> None:
    assert logs(*names).stdout == "\n".join((*shown, ""))


def test_lines_in_json_are_chosen_too() -> None:
    lines = [json.dumps({"process": name, "message": "{"}) for name in ("worker-0/1", "worker-0/2", "head")]
    with closing(LogFile()) as log:
        for line in lines:
            log.write(line)
        assert logs("worker-0").stdout.splitlines() == lines[:2]


@pytest.mark.usefixtures("written")
def test_a_process_without_lines_is_named_beside_those_with_some() -> None:
    result = logs("worker-7")
    assert result.exit_code == 1
    assert (
        result.stderr == "pdserve: worker-7 logged nothing; the log has lines of head, worker-0, worker-1\n"
    )


def test_without_a_log_it_fails() -> None:
    assert (logs().exit_code, logs("--address", "50051").exit_code) == (1, 1)
    assert "no log of a cluster of yours at 127.0.0.1:50051" in logs("--address", "50051").stderr


def test_a_log_that_another_user_may_have_written_is_not_shown(runtime_folder: Path) -> None:
    with closing(LogFile()) as log:
        log.write(TEXT[0])
    runtime_folder.chmod(0o777)
    result = logs()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "expected a directory of user" in result.stderr


def test_the_running_cluster_comes_first_and_others_by_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(LogFile()) as running:
        running.write("time info head x: running")
        ended_run(monkeypatch, 2_000_000_001, "127.0.0.1:1")
        ended_run(monkeypatch, 2_000_000_002, "127.0.0.1:2")
        assert logs().stdout == "time info head x: running\n"
        assert logs("--address", "localhost:1").stdout == "time info head x: run 2000000001\n"
    assert logs().stdout == "time info head x: run 2000000002\n", "the last one"


def test_only_the_last_logs_are_kept(monkeypatch: pytest.MonkeyPatch, runtime_folder: Path) -> None:
    for number in range(NUM_KEPT + 2):
        ended_run(monkeypatch, 2_000_000_000 + number, f"127.0.0.1:{1 + number}")
    assert len(list(runtime_folder.glob("up-*.log"))) == NUM_KEPT
    assert logs("--address", "127.0.0.1:1").exit_code == 1
    assert len([link for link in runtime_folder.iterdir() if link.is_symlink()]) == NUM_KEPT


def test_a_long_log_has_its_newest_lines_and_a_bounded_size() -> None:
    with closing(LogFile(max_bytes=100)) as log:
        for number in range(100):
            log.write(f"time info head x: {number:04}")
        path = log_file.latest()
        assert path is not None
        shown = list(read(path))
        assert path.stat().st_mode & 0o777 == 0o600
        assert sum(map(len, shown)) <= 2 * (100 + len(shown[0]))
    assert shown[-1] == "time info head x: 0099\n"
    numbers = [int(line.split()[-1]) for line in shown]
    assert numbers == list(range(numbers[0], 100))


def test_a_log_is_followed_over_full_files_until_its_writer_is_gone() -> None:
    log = LogFile(max_bytes=100)
    steps: list[Callable[[], None]] = [
        lambda: log.write("\n".join(f"line {number}" for number in range(3, 40))),
        lambda: log.write("the last"),
        log.close,
    ]
    for number in range(3):
        log.write(f"line {number}")
    path = log_file.latest()
    assert path is not None
    seen = list(followed(path, pause=lambda _: steps.pop(0)()))
    assert seen[:3] == ["line 0\n", "line 1\n", "line 2\n"]
    assert seen[-1] == "the last\n"
    assert not steps


def test_an_interrupted_start_leaves_no_log(runtime_folder: Path) -> None:
    with closing(LogFile()) as log:
        log.publish("127.0.0.1:1")
        log.remove()
    assert not list(runtime_folder.iterdir())
