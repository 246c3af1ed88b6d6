"""The state of a cluster on a terminal."""

import io
import os
import pty
import re
import subprocess
import sys
from typing import Any

from pdserve.cli.status import as_table, as_text
from pdserve.proto import pdserve_pb2 as pb
from tests.cli.conftest import ServerThread


def status(**changes: Any) -> pb.ClusterStatus:
    worker: dict[str, Any] = {
        "num_free_blocks": 1234,
        "num_blocks": 1234,
        "num_running": 12,
        "age_s": 7000,
    }
    workers = [
        pb.WorkerStatus(worker_id="prefill-0", role="prefill", state=pb.WORKER_STATE_READY, **worker),
        pb.WorkerStatus(
            worker_id="decode-0",
            role="decode",
            state=pb.WORKER_STATE_STARTING,
            fraction=1.0,
            **worker,
            **changes,
        ),
    ]
    return pb.ClusterStatus(model="m", workers=workers)


def test_a_table_fits_80_columns_also_with_restarts() -> None:
    for one in (status(), status(num_restarts=2)):
        text = as_text(one, False, 80)
        assert max(map(len, text.plain.splitlines())) <= 80
        assert ("RESTARTS" in text.plain) == bool(one.workers[1].num_restarts)


def test_a_long_model_name_does_not_hide_what_is_running() -> None:
    one = status()
    one.model, one.num_running_requests = "a-model-" * 8, 7
    lines = as_text(one, False, 100).plain.splitlines()
    assert lines[1] == "7 running, 0 queued"
    assert "AGE" in lines[3] and "RESTARTS" in lines[3], "the table is as wide as it may be"


def test_a_wide_terminal_has_the_table_of_a_pipe() -> None:
    assert as_text(status(), False, 200).plain == as_table(status())


def test_the_processes_of_all_ranks_are_in_the_wide_table() -> None:
    one = status(pid=101, rank_pids=[102, 103])
    assert "101,102,103" in as_table(one, wide=True)


def test_unequal_kernels_are_named_with_their_workers() -> None:
    one = status(kernels="avx2")
    assert "kernels" not in as_table(one), "the other worker has none yet"
    one.workers[0].kernels = "avx2"
    assert "kernels" not in as_table(one)
    assert "avx2" in as_table(one, wide=True)
    one.workers[0].kernels = "amx"
    assert as_table(one).endswith("amx on prefill-0; avx2 on decode-0")


def test_states_have_colours() -> None:
    styles = {
        as_text(status(), False, 80).plain[span.start : span.end]: span.style
        for span in as_text(status(), False, 80).spans
    }
    assert styles == {"Ready": "green", "Starting(100%)": "yellow"}


def test_watching_on_a_terminal_redraws_in_place(server: ServerThread) -> None:
    server.stop_when_watched()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from pdserve.cli.entry import main; main()", "status", "-w"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [*command, "--address", server.address], stdout=theirs, stderr=subprocess.DEVNULL, env=environment
    ):
        os.close(theirs)
        shown = io.BytesIO()
        try:
            while data := os.read(ours, 4096):
                shown.write(data)
        except OSError:  # the terminal's other end is closed
            pass
    os.close(ours)
    text = shown.getvalue().decode()
    assert "\x1b[2J" not in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    assert any(line.startswith("NAME") for line in lines)
    assert max(map(len, lines)) <= 80
