"""The hosts of `provider: local`, as Ray's autoscaler on the head reads them.

Ray reads its file every five seconds, but takes new hosts from its notes (a state file), which it makes once;
and where the file has fewer, it ends any of them. So it reads a copy, which follows the file when the notes
have."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .client import CommandFailed

SSH_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
)


def follow(file: Path, copy: Path) -> None:
    """Ray goes to hosts that are new in `file`, and those that are in it no more leave. Raises
    CommandFailed."""
    wanted, before = _read(file), _read(copy)
    for host in added(wanted, before):
        print(f"{host}: joins")
    if is_local(wanted):
        noted = subprocess.run(
            ["ray", "get-worker-ips", str(file)], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if noted.returncode:  # it has read the file, and brought the notes up to date
            raise CommandFailed(f"Ray refuses the hosts in {file}: {noted.stderr.strip()}")
    write_copy(file, copy)
    for host in added(before, wanted):
        print(f"{host}: leaves", flush=True)
        command = ssh_command(wanted, host, "ray stop")
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            print(f"{host}: Ray could not be ended there; run `ray stop` on it", file=sys.stderr)


def end_ray(file: Path) -> None:
    """Begins to end Ray on all hosts of `file` but the head, and does not wait: by themselves, agents of a
    Ray whose head has gone try for a minute to report it."""
    wanted = _read(file)
    for host in added(wanted, {"provider": {"type": "local"}}):
        command, nowhere = ssh_command(wanted, host, "ray stop"), subprocess.DEVNULL
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def write_copy(file: Path, copy: Path) -> None:
    """Writes atomically, as Ray may read the file meanwhile."""
    new = copy.with_suffix(".new")
    new.touch(0o600)
    new.write_bytes(file.read_bytes())
    new.replace(copy)


def is_local(file: Mapping[str, Any]) -> bool:
    """Whether its hosts are there already, rather than a cloud's."""
    return bool(file.get("provider", {}).get("type") == "local")


def added(after: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Hosts that one file names and the other, of the same head, does not."""
    if not (is_local(after) and is_local(before)):
        return []
    known = before["provider"].get("worker_ips", ())
    return [host for host in after["provider"].get("worker_ips", ()) if host not in known]


def ssh_command(file: Mapping[str, Any], host: str, command: str) -> list[str]:
    """Runs `command` on the host as Ray does: as the user and with the key of the file, in a login shell."""
    auth = file.get("auth", {})
    key = ["-i", os.path.expanduser(auth["ssh_private_key"])] if "ssh_private_key" in auth else []
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    user = f"{auth['ssh_user']}@" if "ssh_user" in auth else ""
    there = f"bash --login -c -i {shlex.quote(f'source ~/.bashrc; {command}')}"
    return ["ssh", "-tt", *key, *options, f"{user}{host}", there]


def _read(file: Path) -> Mapping[str, Any]:
    """Reads the file that Ray has checked and written; returns nothing where there is none."""
    return yaml.safe_load(file.read_text()) if file.exists() else {}
