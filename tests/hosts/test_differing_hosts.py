"""Hosts that cannot serve beside the head, or no longer: each is named in the status, with cause and fix, and
the others serve."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import pdserve
from pdserve.embedded import MODEL_DIR

from .clients import clients, first_answer
from .network import Hosts
from .status import Status, await_status, is_whole, states, timed

pytestmark = [pytest.mark.journey, pytest.mark.hosts, pytest.mark.cluster, pytest.mark.timeout(3600)]

CONFIG = """
provider: {{type: local, head_ip: {head}, worker_ips: [{worker1}, {worker2}]}}
metadata:
  pdserve:
    model: {{path: /root/model}}
    pools:
      prefill: {{instances: 1, kv_cache_bytes: 256MiB}}
      decode: {{instances: 2, kv_cache_bytes: 256MiB, max_batch_size: 2}}  # so that four streams need both
"""
SETTINGS = "RAY_AUTH_MODE=token RAY_worker_niceness=0 RAY_raylet_start_wait_time_s=240"
RAY = SETTINGS + " ray start {role} --node-ip-address={address} --num-cpus=1 --temp-dir=/root/.pdserve/ray"
QUIET = " --object-store-memory=80000000 --include-log-monitor=false"
LOSE_INSTANCES = "pkill -9 ray::WorkerActo"
AN_HOUR_AHEAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*original)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = original(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 3600;
    return status;
}
"""
ASK = "pdserve generate --temperature 0 --max-tokens 8 'The with statement'"
CGROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
SHOW_CGROUPS = (
    f"mount -t tmpfs tmpfs {CGROUPS.parent} && mkdir {CGROUPS} && mount -t cgroup -o memory cgroup {CGROUPS}"
)
GIB = 1 << 30
NUM_CLIENTS = 4


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
        own_disk = "mount -t tmpfs -o size=256m,mode=700 tmpfs ~/.pdserve; " if name == "worker2" else ""
        hosts.run(
            name,
            f"mkdir -m 700 ~/.pdserve; {own_disk}" + RAY.format(role=role, address=addresses[name]) + QUIET,
        )
    hosts.run(
        "head",
        f"RAY_AUTH_MODE=token RAY_ADDRESS={addresses['head']}:6379 setsid nohup pdserve up cluster.yaml >"
        " up.log 2>&1 & until pdserve status > /dev/null 2>&1; do :; done",
    )
    return hosts


def message(status: Status, address: str) -> str:
    """A Ray that was killed is there beside its successor until it is declared dead."""
    return " ".join(host.get("message", "") for host in status["hosts"] if host["address"] == address)


def await_state(cluster: Hosts, state: str, cause: str) -> Status:
    """The first status with worker2 in that state; prints how long it took."""
    worker2 = cluster.address("worker2")
    with timed(f"{cause}, until the host is {state}"):
        return await_status(cluster, lambda status: states(status).get(worker2) == state)


def test_a_host_without_the_checkpoint_is_refused_until_it_has_it(cluster: Hosts) -> None:
    worker2 = cluster.address("worker2")
    status = await_state(cluster, "REFUSED", "no checkpoint there")
    assert "/root/model" in message(status, worker2) and "copy the head's checkpoint" in message(
        status, worker2
    )
    assert cluster.run("head", ASK)
    shutil.copytree(MODEL_DIR, cluster.home("worker2") / "model")
    await_status(cluster, is_whole)


def restart_ray(cluster: Hosts, num_cores: int = 1, environment: str = "LANG=C") -> None:
    """Ray on worker2 dies, and another one joins."""
    worker2 = cluster.address("worker2")
    cluster.run("worker2", "pkill -9 raylet")
    await_status(cluster, lambda status: states(status).get(worker2) != "JOINED")
    start_ray(cluster, num_cores, environment)


def start_ray(cluster: Hosts, num_cores: int = 1, environment: str = "LANG=C") -> None:
    worker2 = cluster.address("worker2")
    cluster.run("worker2", "ray stop")
    start = RAY.format(role=f"--address={cluster.address('head')}:6379", address=worker2)
    start = start.replace("--num-cpus=1", f"--num-cpus={num_cores}")
    cluster.run("worker2", f"rm -rf ~/.pdserve/ray; export {environment}; {start}{QUIET}")


def test_a_host_with_another_version_is_refused(cluster: Hosts) -> None:
    worker2, package = cluster.address("worker2"), cluster.home("worker2") / "older" / "pdserve"
    package.mkdir(parents=True)
    for room in Path(pdserve.__file__).parent.iterdir():
        if room.is_symlink():
            (package / room.name).symlink_to(room.resolve())
    (package / "__init__.py").write_text('__version__ = "0.0.9"\n')
    restart_ray(cluster, environment="PYTHONPATH=/root/older")
    status = await_state(cluster, "REFUSED", "another version there")
    assert f"it runs pdserve 0.0.9, the head {pdserve.__version__}; install" in message(status, worker2)
    assert cluster.run("head", ASK)


def test_a_host_is_refused_until_it_has_the_heads_checkpoint(cluster: Hosts) -> None:
    worker2, config = cluster.address("worker2"), cluster.home("worker2") / "model" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("{", '{"rope_theta": 1234.0, ', 1))
    restart_ray(cluster)
    status = await_state(cluster, "REFUSED", "another checkpoint there")
    assert "another checkpoint lies at /root/model" in message(status, worker2)
    config.write_text(before)
    await_status(cluster, is_whole)


@contextmanager
def streams(cluster: Hosts) -> Iterator[None]:
    """Streams on both decode instances run while the block does, and end as undisturbed ones do."""
    with clients(cluster, first_answer(cluster), NUM_CLIENTS):
        await_status(cluster, lambda status: all(worker["num_running"] for worker in decoding(status)))
        yield


def decoding(status: Status) -> list[Status]:
    return [worker for worker in status["workers"] if worker["role"] == "decode"]


def loads_on(status: Status, host: str) -> bool:
    return any(
        worker["node"] == host and worker["phase"] == "allocating memory" for worker in status["workers"]
    )


@pytest.mark.parametrize("folder", ["/dev/shm", "/tmp", "/root/.pdserve"])
def test_a_host_that_fills_up_under_instances_gets_no_more_until_it_has_room(
    cluster: Hosts, folder: str
) -> None:
    """Ray's folder is in ~/.pdserve, which is on a file system of its own for this: without instances, nothing
    starts there to find it full."""
    worker2 = cluster.address("worker2")
    with streams(cluster):
        cluster.run("worker2", f"cat /dev/zero > {folder}/full 2> /dev/null || true")
        status = await_state(cluster, "REFUSED", f"{folder} is full")
        cluster.run("worker2", LOSE_INSTANCES)
    assert f"no space is left in {folder}" in message(status, worker2)
    assert "make room: the host is then used again" in message(status, worker2)
    status = await_status(cluster, lambda status: not is_whole(status))
    causes = (f"no space is left in {folder}", "processes end as they start there")
    assert any(f"host {worker2}: {cause}" in status["degraded"] for cause in causes)
    cluster.run("worker2", f"rm {folder}/full")
    await_status(cluster, is_whole)


def test_a_host_whose_memory_fills_up_gets_no_instance_until_it_has_room(cluster: Hosts) -> None:
    """All of the host's processes get into a cgroup, and one of them takes most of what its limit grants."""
    if not (CGROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("no cgroups of version 1, whose limits apply to the processes of one host alone")
    worker2, ours = cluster.address("worker2"), CGROUPS / own_cgroup()
    group = ours / cluster.name
    cluster.run("worker2", SHOW_CGROUPS)
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(GIB))
        for pid in cluster.pids("worker2"):
            move(pid, group)
        hog = cluster.command("worker2", f"exec python -c 'hog = b\"x\" * {int(GIB * 0.95)}; input()'")
        with streams(cluster):
            with subprocess.Popen(hog, stdin=subprocess.PIPE, preexec_fn=lambda: move(0, group)) as taking:
                status = await_state(cluster, "REFUSED", "its memory is full")
                assert "no space is left in its memory (1 GiB)" in message(status, worker2)
                taking.communicate(b"\n")
            await_status(cluster, is_whole)
    finally:
        while pids := (group / "cgroup.procs").read_text().split():
            for inside in pids:
                move(int(inside), ours)
        group.rmdir()


def own_cgroup() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line.split(":", 2)[2].lstrip("/") for line in lines if ":memory:" in line)


def move(pid: int, group: Path) -> None:
    """0: this process."""
    with suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))


def test_a_frozen_host_serves_again_when_it_thaws(cluster: Hosts) -> None:
    worker2 = cluster.address("worker2")
    with streams(cluster):
        cluster.freeze("worker2")
        with timed("it is frozen, until its instances count as lost"):
            status = await_status(cluster, lambda status: states(status)[worker2] != "JOINED")
        assert "an instance there was lost" in message(status, worker2)
        status = await_state(cluster, "REFUSED", "it is frozen")
        assert "it is frozen, overloaded or cut off from the head" in message(status, worker2)
        cluster.thaw("worker2")
        await_status(cluster, is_whole)


def test_a_rebooted_host_serves_again_once_ray_runs_there(cluster: Hosts) -> None:
    worker2 = cluster.address("worker2")
    with streams(cluster):
        cluster.reboot("worker2", hard=True)
        status = await_state(cluster, "LOST", "it is rebooted")
    assert "Ray does not reach it" in message(status, worker2)
    start_ray(cluster)
    await_status(cluster, is_whole)


def test_a_host_may_leave_while_its_instances_load(cluster: Hosts) -> None:
    restart_ray(cluster)
    await_status(cluster, lambda status: loads_on(status, "worker2"))
    cluster.reboot("worker2", hard=True)
    await_state(cluster, "LOST", "it leaves while instances load")
    assert cluster.run("head", ASK)
    start_ray(cluster)
    await_status(cluster, is_whole)


def test_a_firewall_is_reported_with_both_hosts_before_any_request(cluster: Hosts) -> None:
    cluster.cut("worker1", "worker2")
    cluster.run("worker2", LOSE_INSTANCES)
    for one, other in (("worker1", "worker2"), ("worker2", "worker1")):
        text = f"KV does not get from host {one} to host {other}"
        with timed(f"a firewall, until the status says that {text}"):
            status = await_status(cluster, lambda status, text=text: text in status["degraded"])  # type: ignore[misc]
        assert "let all TCP between the hosts of the cluster through their firewalls" in status["degraded"]
    assert cluster.run("head", ASK)
    cluster.heal("worker1", "worker2")
    await_status(cluster, lambda status: is_whole(status) and not status["degraded"])


def test_a_host_with_a_wrong_clock_serves_with_a_warning(cluster: Hosts) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, which makes the library that sets a clock for some processes alone")
    worker2, home = cluster.address("worker2"), cluster.home("worker2")
    (home / "clock.c").write_text(AN_HOUR_AHEAD)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", home / "clock.so", home / "clock.c", "-ldl"], check=True)
    restart_ray(cluster, environment="LD_PRELOAD=/root/clock.so")
    with timed("another clock there, until the status warns"):
        status = await_status(cluster, lambda status: "its clock" in message(status, worker2))
    assert re.search(
        r"its clock is 3[56]\d\d s ahead of the head's.*set it by NTP",
        message(status, worker2),
    )
    await_status(cluster, is_whole)


def test_a_host_with_fewer_cores_than_an_instance_takes_is_refused(cluster: Hosts) -> None:
    worker2 = cluster.address("worker2")
    restart_ray(cluster, num_cores=0)
    status = await_state(cluster, "REFUSED", "too few cores there")
    assert "it has 0 core(s), and no instance takes less than 1" in message(status, worker2)
    assert cluster.run("head", ASK)
