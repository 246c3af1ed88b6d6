"""An operator's journey with the repository's cluster.yaml: `ray up` from another machine, over ssh, to three
hosts.

In the file only `provider` and `auth` are changed, and the number of decode instances: the head's host alone
has no room for them. `make journey` shows how long each step took."""

import os
import select
from contextlib import suppress
from pathlib import Path

import pytest

from bench.microbench import kv_between_hosts

from .clients import clients, first_answer
from .launcher import NUM_DECODE, configure, edit, ray_up
from .network import BUSY_S, Hosts
from .status import await_status, is_whole, states, timed

pytestmark = [pytest.mark.journey, pytest.mark.hosts, pytest.mark.cluster, pytest.mark.timeout(3600)]

LINK = "1gbit"


def processes(hosts: Hosts, host: str) -> dict[int, str]:
    """The processes of Ray and pdserve there, by the machine's numbers."""
    found = {}
    for pid in hosts.pids(host):
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path("/proc", str(pid), "comm").read_text().strip()
            words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
            if name.startswith("ray") or any(
                b"/ray/" in word or word.endswith(b"/pdserve") for word in words
            ):
                found[pid] = name
    return found


def await_end(pids: dict[int, str]) -> None:
    for pid, name in pids.items():
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            ended = select.select([descriptor], [], [], BUSY_S)[0]
            os.close(descriptor)
            assert ended, f"{name} lives on"


def print_kv_rate(hosts: Hosts) -> None:
    """Shows how much of a link between two hosts KV gets, beside plain TCP in turns."""
    ends = ("worker1", "worker2")
    for host in ends:
        hosts.shape(host, rate=LINK)
    clear = {host: hosts.address(host) for host in ends}
    rates = kv_between_hosts.measure(hosts, *ends, {"clear": clear}, rounds=3)
    print(f"a link of {LINK}: {kv_between_hosts.as_text(rates['clear'])}")
    for host in ends:
        hosts.shape(host)


def test_from_ray_up_to_ray_down(hosts: Hosts) -> None:
    print()
    print_kv_rate(hosts)
    configure(hosts, {host: hosts.address(host) for host in hosts.names()})
    with timed("first `ray up` to first token"):
        with timed("`ray up`"):
            ray_up(hosts)
        reference = first_answer(hosts)

    with timed("all hosts and instances are there"):
        await_status(hosts, is_whole)
    with clients(hosts, reference):
        with timed("`ray up` again"):
            assert "nothing to change" in ray_up(hosts)
        with timed("another ratio"):
            edit(hosts, f"instances: {NUM_DECODE}", f"instances: {NUM_DECODE + 1}")
            ray_up(hosts)
            await_status(hosts, is_whole)
        with timed("a host cut off until its streams went on elsewhere"):
            hosts.isolate("worker2")
            await_status(hosts, lambda status: not is_whole(status))
        with timed("healed, until it has its instances again"):
            hosts.join("worker2")
            await_status(hosts, is_whole)
        kept, removed = hosts.address("worker1"), hosts.address("worker2")
        with timed("a host less"):
            edit(hosts, f", {removed}]", "]")
            edit(hosts, f"instances: {NUM_DECODE + 1}", f"instances: {NUM_DECODE}")
            ray_up(hosts)
            await_status(hosts, lambda status: removed not in states(status))
        with timed("a host more"):
            edit(hosts, f"[{kept}]", f"[{kept}, {removed}]")
            ray_up(hosts)
            await_status(hosts, is_whole)

    hosts.run("head", "pkill -9 ray::HeadActor")
    with timed("the head's process killed, to first token"):
        assert first_answer(hosts) == reference

    hosts.run("head", "kill -9 $(pgrep -f 'pdserve u[p]')")
    with timed("`pdserve up` killed, to first token"):
        assert first_answer(hosts) == reference

    with timed("the head's host rebooted, to first token"):
        hosts.reboot("head")
        assert first_answer(hosts) == reference

    with timed("`ray down`"):
        hosts.run("operator", "ray down -y cluster.yaml")
    assert processes(hosts, "head") == {}
    assert hosts.run("head", "ls /tmp | grep pdserve; ls /dev/shm; crontab -l 2> /dev/null || true") == ""
    with timed("and the other hosts' Ray has ended"):
        for host in hosts.names():
            await_end(processes(hosts, host))
            assert processes(hosts, host) == {}
            assert hosts.run(host, "ls -d /tmp/pdserve* /dev/shm/* 2> /dev/null || true") == ""
