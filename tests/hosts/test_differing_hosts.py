"""Hosts that cannot serve beside the head: each is named in the status, with cause and fix, and the others serve."""

import shutil

import pytest

from pdserve.embedded import MODEL_DIR

from .network import Hosts
from .status import Status, await_status, is_whole, states

pytestmark = [pytest.mark.journey, pytest.mark.hosts, pytest.mark.cluster, pytest.mark.timeout(600)]

CONFIG = """
provider: {{type: local, head_ip: {head}, worker_ips: [{worker1}, {worker2}]}}
metadata:
  pdserve:
    model: {{path: /root/model}}
    pools:
      prefill: {{instances: 1}}
      decode: {{instances: 2}}
"""
RAY = "RAY_AUTH_MODE=token ray start {role} --node-ip-address={address} --num-cpus=1 --temp-dir=/root/.pdserve/ray"
QUIET = " --object-store-memory=80000000 --include-log-monitor=false"
ASK = "pdserve generate --temperature 0 --max-tokens 8 'The with statement'"


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Hosts:
    """Serves on the head and worker1, where Ray runs; worker2 has a Ray, and no checkpoint."""
    names = ("head", "worker1", "worker2")
    addresses = {name: hosts.address(name) for name in names}
    (hosts.home("head") / "cluster.yaml").write_text(CONFIG.format(**addresses))
    for name in names:
        if name != "worker2":
            shutil.copytree(MODEL_DIR, hosts.home(name) / "model")
        (hosts.home(name) / ".ray").mkdir(mode=0o700)
        token = hosts.home(name) / ".ray" / "auth_token"
        token.touch(0o600)
        token.write_text("a" * 64)
        role = "--head --port=6379" if name == "head" else f"--address={addresses['head']}:6379"
        hosts.run(name, "mkdir -m 700 ~/.pdserve; " + RAY.format(role=role, address=addresses[name]) + QUIET)
    hosts.run(
        "head",
        f"RAY_AUTH_MODE=token RAY_ADDRESS={addresses['head']}:6379 setsid nohup pdserve up cluster.yaml > up.log 2>&1 &"
        " until pdserve status > /dev/null 2>&1; do :; done",
        timeout_s=120.0,
    )
    return hosts


def message(status: Status, address: str) -> str:
    """A Ray that was killed is there beside its successor until it is declared dead."""
    return " ".join(host.get("message", "") for host in status["hosts"] if host["address"] == address)


def test_a_host_without_the_checkpoint_is_refused_until_it_has_it(cluster: Hosts) -> None:
    worker2 = cluster.address("worker2")
    status = await_status(cluster, lambda status: states(status).get(worker2) == "REFUSED")
    assert "/root/model" in message(status, worker2) and "copy the head's checkpoint" in message(status, worker2)
    assert cluster.run("head", ASK)
    shutil.copytree(MODEL_DIR, cluster.home("worker2") / "model")
    await_status(cluster, is_whole)


def test_a_host_with_another_checkpoint_is_refused_until_it_has_the_heads(cluster: Hosts) -> None:
    worker2, config = cluster.address("worker2"), cluster.home("worker2") / "model" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"rope_theta": 1234.0, ', 1))
    cluster.run("worker2", "pkill -9 raylet")
    await_status(cluster, lambda status: states(status).get(worker2) != "JOINED")
    cluster.run("worker2", "ray stop")
    start = RAY.format(role=f"--address={cluster.address('head')}:6379", address=worker2)
    cluster.run("worker2", f"rm -rf ~/.pdserve/ray; {start}{QUIET}")
    status = await_status(cluster, lambda status: states(status).get(worker2) == "REFUSED")
    assert "another checkpoint lies at /root/model" in message(status, worker2)
    config.write_text(before)
    await_status(cluster, is_whole)
