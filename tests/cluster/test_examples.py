"""Each example works as documented against a real cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .harness import Cluster

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    listen = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0", "admin_without_key": True}
    cluster = Cluster("embedded", listen=listen)
    yield cluster
    cluster.close()


def run(*command: str) -> str:
    """Returns the example's output; fails if the example fails."""
    paths = os.pathsep.join([str(ROOT), str(Path(sys.executable).parent)])
    env = os.environ | {
        "PATH": f"{paths}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_grpc_client_streams_and_names_its_workers(cluster: Cluster) -> None:
    printed = run(sys.executable, str(EXAMPLES / "grpc_client.py"), cluster.address, "The with statement")
    assert "[FINISH_REASON_LENGTH]" in printed
    assert "prefill on worker-1, decode on worker-0" in printed


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
