"""The promises of `scripts/hosts` about the hosts that it makes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..deadlines import WAIT_S
from .network import REPOSITORY, Hosts, HostsError, whats_missing

pytestmark = pytest.mark.hosts
SSH = "ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR -o ConnectTimeout=60"


def reaches(hosts: Hosts, one: str, other: str, within_s: float = WAIT_S) -> bool:
    """Whether a connection to the other's sshd comes about."""
    command = f"timeout {within_s} bash -c '< /dev/tcp/{other}/22'"
    return subprocess.run(hosts.command(one, command), capture_output=True).returncode == 0


def is_cut_off(hosts: Hosts, one: str, other: str) -> bool:
    return not reaches(hosts, one, other, within_s=1.0)


def test_only_the_operator_reaches_each_host_by_ssh(hosts: Hosts) -> None:
    for host in hosts.names()[1:]:
        assert hosts.run("operator", f"{SSH} {host} hostname") == f"{host}\n"
    with pytest.raises(HostsError, match="Permission denied"):
        hosts.run("head", f"{SSH} -o BatchMode=yes worker1 hostname")


def test_commands_of_ssh_find_this_repository(hosts: Hosts) -> None:
    there = hosts.run(
        "operator",
        f"{SSH} head 'command -v pdserve && python -c \"import pdserve; print(pdserve.__file__)\"'",
    )
    assert there.split() == ["/root/bin/pdserve", str(Path(__file__).parents[2] / "pdserve" / "__init__.py")]


def test_only_the_cut_link_is_cut_in_both_directions(hosts: Hosts) -> None:
    hosts.cut("worker1", "worker2")
    assert is_cut_off(hosts, "worker1", "worker2") and is_cut_off(hosts, "worker2", "worker1")
    assert reaches(hosts, "head", "worker1") and reaches(hosts, "worker2", "head")
    hosts.heal("worker1", "worker2")
    assert reaches(hosts, "worker1", "worker2") and reaches(hosts, "worker2", "worker1")


def test_an_isolated_host_is_alone_until_it_joins(hosts: Hosts) -> None:
    hosts.isolate("worker1")
    assert is_cut_off(hosts, "worker1", "head") and is_cut_off(hosts, "worker2", "worker1")
    hosts.join("worker1")
    assert reaches(hosts, "worker1", "head") and reaches(hosts, "worker2", "worker1")


def test_a_cut_outlasts_a_reboot(hosts: Hosts) -> None:
    hosts.cut("head", "worker1")
    hosts.reboot("worker1")
    assert is_cut_off(hosts, "worker1", "head")
    hosts.heal("head", "worker1")
    assert reaches(hosts, "worker1", "head")


@pytest.mark.parametrize("hard", [False, True])
def test_a_reboot_ends_all_processes_and_keeps_the_home(hosts: Hosts, hard: bool) -> None:
    hosts.run(
        "worker1",
        "touch /tmp/gone /dev/shm/gone /run/gone kept; setsid sleep 1000 < /dev/null > /dev/null 2>&1 &",
    )
    assert "sleep 1000" in hosts.run("worker1", "ps -ef")
    others = set(hosts.pids("worker2"))
    hosts.reboot("worker1", hard)
    assert "sleep 1000" not in hosts.run("worker1", "ps -ef")
    assert (
        hosts.run("worker1", "ls -d kept /tmp/gone /dev/shm/gone /run/gone 2> /dev/null || true") == "kept\n"
    )
    assert others <= set(hosts.pids("worker2"))
    assert reaches(hosts, "head", "worker1")


def test_cron_runs_reboot_jobs(hosts: Hosts) -> None:
    hosts.run("worker1", "mkfifo started; echo '@reboot echo \"$(hostname)\" > started' | crontab -")
    hosts.reboot("worker1")
    assert hosts.run("worker1", "timeout 120 cat started; crontab -r") == "worker1\n"


def test_a_frozen_host_does_nothing_until_it_thaws(hosts: Hosts) -> None:
    hosts.freeze("worker1")
    states = {
        Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2][0] for pid in hosts.pids("worker1")
    }
    assert states == {"T"}
    hosts.thaw("worker1")
    assert hosts.run("operator", f"{SSH} worker1 hostname") == "worker1\n"


def test_a_rate_limits_both_directions_of_a_link(hosts: Hosts) -> None:
    hosts.shape("worker1", rate="10mbit")
    port = f"port{hosts.names().index('worker1')}"
    assert "rate 10Mbit" in hosts.run("worker1", "tc qdisc show dev eth0")
    assert "rate 10Mbit" in subprocess.check_output(
        ["tc", "-n", f"{hosts.name}-switch", "qdisc", "show", "dev", port], text=True
    )
    hosts.shape("worker1")
    assert "rate" not in hosts.run("worker1", "tc qdisc show dev eth0")


def test_a_kernel_without_netem_is_named(hosts: Hosts) -> None:
    probe = hosts.command("worker1", "tc qdisc add dev lo root netem && tc qdisc del dev lo root")
    if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0:
        pytest.skip("this kernel has netem")
    with pytest.raises(HostsError, match="delay and loss take the kernel's module sch_netem"):
        hosts.shape("worker1", delay="1ms")


def test_fill_exhausts_a_private_folder_and_refuses_the_shared_disk(hosts: Hosts) -> None:
    hosts.fill("worker1", "/run")
    with pytest.raises(HostsError, match="No space left"):
        hosts.run("worker1", "echo x > /run/more")
    with pytest.raises(HostsError, match="folder: got '/root'"):
        hosts.fill("worker1", "/root")
    hosts.reboot("worker1")


def test_mistakes_are_named(hosts: Hosts) -> None:
    with pytest.raises(
        HostsError, match="host: got 'worker9', expected one of operator, head, worker1, worker2"
    ):
        hosts.reboot("worker9")
    with pytest.raises(HostsError, match="network: got 'a-b', expected at most 8 ASCII letters or digits"):
        Hosts("a-b")
    with pytest.raises(
        HostsError, match="has hosts already: operator, head, worker1, worker2; take them away with `down`"
    ):
        hosts.up(["one"])


def test_without_root_or_a_command_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getuid", lambda: 1000)
        with pytest.raises(HostsError, match="hosts are made of namespaces, which takes root"):
            Hosts("nobody").up(["one"])
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else name)
    assert whats_missing() == "not found: tc (apt-get install iproute2; dnf install iproute-tc)"


def test_the_command_makes_hosts_runs_there_and_removes_them() -> None:
    if reason := whats_missing():
        pytest.skip(reason)
    network = Hosts(f"c{os.getpid()}")

    def scripts_hosts(*words: str) -> str:
        command = [str(REPOSITORY / "scripts" / "hosts"), "--net", network.name, *words]
        return subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)

    try:
        scripts_hosts("up", "2")
        homes = {name: f"{name}\t{network.address(name)}\t{network.home(name)}\n" for name in network.names()}
        assert list(homes) == ["operator", "host1"]
        assert scripts_hosts("list") == "".join(homes.values())
        assert scripts_hosts("run", "host1", "hostname;", "pwd") == "host1\n/root\n"
        scripts_hosts("cut", "operator", "host1")
        assert is_cut_off(network, "operator", "host1")
        scripts_hosts("heal", "operator", "host1")
        assert reaches(network, "operator", "host1")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            scripts_hosts("isolate", "host9")
        assert refused.value.output == "hosts: host: got 'host9', expected one of operator, host1\n"
        scripts_hosts("down")
        assert not network.folder.exists()
    finally:
        network.down()


def test_down_leaves_nothing() -> None:
    if reason := whats_missing():
        pytest.skip(reason)
    network = Hosts(f"d{os.getpid()}")
    network.up(["one", "two"])
    pids = [pid for host in network.names() for pid in network.pids(host)]
    assert pids and network.folder.stat().st_mode & 0o777 == 0o700
    for _ in range(2):  # idempotent
        network.down()
        assert not network.folder.exists()
        assert not list(Path("/run/netns").glob(f"{network.name}-*"))
        assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]
        assert str(network.folder) not in Path("/proc/mounts").read_text()
