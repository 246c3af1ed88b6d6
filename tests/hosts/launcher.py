"""The operator's part: the repository's cluster.yaml with `provider` and `auth` changed, and `ray up`."""

import os
from pathlib import Path

from .network import Hosts

FILE = Path(__file__).parents[2] / "cluster.yaml"
NUM_DECODE = (os.cpu_count() or 1) + 1  # each host has all of the machine's cores


def configure(hosts: Hosts, addresses: dict[str, str]) -> None:
    """Sets up the operator's initial files: the configuration, and Ray's token. The first host is the
    operator's, the second the head's."""
    _, head, *workers = (addresses[host] for host in hosts.names())
    (hosts.home("operator") / "cluster.yaml").write_text(FILE.read_text())
    for ours, theirs in (
        ("head_ip: 127.0.0.1", f"head_ip: {head}"),
        ("worker_ips: []", f"worker_ips: [{', '.join(workers)}]"),
        ("\nauth:\n  ssh_user: ubuntu", "\nauth:\n  ssh_user: root"),
        ("  # ssh_private_key: ~/.ssh/id_ed25519", "  ssh_private_key: ~/.ssh/id_ed25519"),
        ("      decode:\n        instances: 1", f"      decode:\n        instances: {NUM_DECODE}"),
    ):
        edit(hosts, ours, theirs)
    hosts.run("operator", "(umask 077; ray get-auth-token --generate)")


def edit(hosts: Hosts, ours: str, theirs: str) -> None:
    file = hosts.home("operator") / "cluster.yaml"
    text = file.read_text()
    assert text.count(ours) == 1, ours
    file.write_text(text.replace(ours, theirs))


def ray_up(hosts: Hosts) -> str:
    return hosts.run("operator", "ray up -y cluster.yaml")
