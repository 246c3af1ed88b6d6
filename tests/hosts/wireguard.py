"""A WireGuard network among hosts: every pair speaks encrypted, at addresses of their own (10.78.0.1 and on).

By the kernel's module, or where there is none by wireguard-go, which encrypts in a process of its own and
costs more."""

import shutil
import subprocess
from pathlib import Path

from tests.hosts.network import Hosts, HostsError, run

DEVICE, PORT, KEY = "wg0", 51820, "wireguard.key"
MTU = 1420


def whats_missing() -> str | None:
    """Why traffic between hosts cannot be encrypted here, and the remedy; None where it can."""
    needed = {"wg": "wireguard-tools"} | ({} if has_module() else {"wireguard-go": "wireguard-go"})
    missing = [package for command, package in needed.items() if shutil.which(command) is None]
    return f"not found: apt-get install {' '.join(missing)}" if missing else None


def has_module() -> bool:
    """Whether the kernel itself speaks WireGuard."""
    made = (
        subprocess.run(
            ["ip", "link", "add", "wg-probe", "type", "wireguard"], stderr=subprocess.DEVNULL
        ).returncode
        == 0
    )
    if made:
        run("ip", "link", "del", "wg-probe")
    return made


def encrypt(hosts: Hosts) -> dict[str, str]:
    """Connects all hosts; returns their addresses in the encrypted network. They go with the hosts. Raises
    HostsError."""
    if reason := whats_missing():
        raise HostsError(reason)
    names, in_kernel = hosts.names(), has_module()
    addresses = {name: f"10.78.0.{number}" for number, name in enumerate(names, 1)}
    public = {name: _make_keys(hosts.home(name) / KEY) for name in names}
    for name in names:
        start = (
            f"ip link add {DEVICE} type wireguard" if in_kernel else f"wireguard-go {DEVICE} > /dev/null 2>&1"
        )
        peers = [
            f"peer {public[peer]} allowed-ips {addresses[peer]}/32 endpoint {hosts.address(peer)}:{PORT}"
            for peer in names
            if peer != name
        ]
        hosts.run(
            name,
            f"{start} && wg set {DEVICE} listen-port {PORT} private-key ~/{KEY} {' '.join(peers)}"
            f" && ip addr add {addresses[name]}/24 dev {DEVICE} && ip link set {DEVICE} mtu {MTU} up",
        )
    return addresses


def _make_keys(file: Path) -> str:
    """Leaves the private key in `file`; returns the public one."""
    file.touch(0o600)
    file.write_text(subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout)
    return subprocess.run(
        ["wg", "pubkey"], input=file.read_text(), check=True, capture_output=True, text=True
    ).stdout.strip()
