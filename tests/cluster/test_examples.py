"""Each example works as documented against a real cluster."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdserve.cli.models import MODELS, installed

from .harness import Cluster, Clusters

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def cluster(clusters: Clusters) -> Cluster:
    return clusters.get()


def run(*command: str, **variables: str) -> str:
    """Returns the example's output; fails if the example fails."""
    paths = os.pathsep.join([str(ROOT), str(Path(sys.executable).parent)])
    env = os.environ | {
        "PATH": f"{paths}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
        **variables,
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_grpc_client_streams_and_names_its_workers(cluster: Cluster) -> None:
    printed = run(sys.executable, str(EXAMPLES / "grpc_client.py"), cluster.address, "The with statement")
    assert "[FINISH_REASON_LENGTH]" in printed
    (prefill,), (decode,) = cluster.workers("prefill"), cluster.workers("decode")
    assert f"prefill on {prefill.worker_id}, decode on {decode.worker_id}" in printed


def test_the_openai_client_gets_the_same_text_whole_and_streamed(cluster: Cluster) -> None:
    address = f"http://{cluster._launched.http_address}/v1"
    whole, stream, refused = run(sys.executable, str(EXAMPLES / "openai_client.py"), address).splitlines()
    assert whole.removeprefix("whole: ") == stream.removeprefix("stream: ")
    assert "max_tokens" in refused


def test_the_load_run_reports_goodput_at_both_rates(cluster: Cluster) -> None:
    printed = run(str(EXAMPLES / "load_run.sh"), cluster.address)
    assert printed.count("goodput") >= 2


def test_streams_end_whole_while_the_ratio_changes(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"metadata": {"pdserve": cluster.settings}}))
    printed = run(sys.executable, str(EXAMPLES / "apply_under_load.py"), cluster.address, str(file))
    assert ", 0 not whole" in printed


def free_ports(number: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [str(one.getsockname()[1]) for one in sockets]


FAILING = """#!/bin/sh
case $1 in
validate | plan | status) [ $# = 1 ] && [ $1 != status ] ;;
up) echo '"ready: ' >&2; echo $$ > "$PID_FILE"; exec sleep 600 ;;
*) exit 1 ;;
esac
"""


def test_a_first_hour_that_fails_leaves_no_cluster(tmp_path: Path) -> None:
    program = tmp_path / "pdserve"
    program.write_text(FAILING)
    program.chmod(0o700)
    pid_file = tmp_path / "pid"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "PID_FILE": str(pid_file), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [EXAMPLES / "first_hour.sh"], env=os.environ | variables, capture_output=True, timeout=60
    )
    assert done.returncode == 1, done.stdout
    assert not Path(f"/proc/{int(pid_file.read_text())}").exists()
    assert not list(tmp_path.glob("tmp.*")), "its folder is gone"


def test_the_first_hour_prints_what_it_says(tmp_path: Path) -> None:
    """With a model that talks, where its package is installed."""
    script = EXAMPLES / "first_hour.sh"
    grpc, http = free_ports(2)
    model = str(installed(MODELS["smollm2"]) or "embedded")
    printed = run(
        str(script),
        model,
        GRPC_PORT=grpc,
        HTTP_PORT=http,
        PDSERVE_RUNTIME_DIR=str(tmp_path / "runtime"),
        TMPDIR=str(tmp_path),
        COLUMNS="80",
    )
    lines = iter(printed.splitlines())
    for said in re.findall(r"^#> (.*)$", script.read_text(), re.MULTILINE):
        pattern = re.compile(".*".join(map(re.escape, said.split("..."))))
        assert any(pattern.fullmatch(line) for line in lines), f"{said!r} is not in:\n{printed}"
    assert not list(tmp_path.glob("tmp.*")), "its folder is gone"
