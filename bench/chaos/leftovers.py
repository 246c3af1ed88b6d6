"""The machine's resources that a cluster holds: processes, sockets, shared memory, files. Found through /proc
and a marker in the environment."""

import os
import secrets
from collections import Counter
from contextlib import suppress
from pathlib import Path

MARK = "PDSERVE_ORDEAL"
# Ray keeps some processes for later; those in use have another name
RAYS_IDLE = b"/ray/_private/workers/default_worker.py"
TEMP_PREFIXES = ("ray", "plasma", "psm", "torch", "gloo")


def mark_descendants() -> None:
    """Marks every process started from now on for `descendants`. An existing mark stays."""
    os.environ.setdefault(MARK, secrets.token_hex(8))


def descendants() -> dict[int, str]:
    """The other processes that were started under our mark, with their commands."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or not ours
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    if RAYS_IDLE not in command:
                        found[int(process.name)] = command.decode(errors="replace")[:100]
    return found


def router_pid() -> int | None:
    """The process id of the current head; None while there is none."""
    return next((pid for pid, command in descendants().items() if "HeadActor" in command), None)


def holdings(actor: str) -> dict[str, int]:
    """Processes of this actor class among the descendants, and the sockets and rings of shared memory that
    they hold."""
    pids = [pid for pid, command in descendants().items() if actor in command]
    total: Counter[str] = Counter(processes=len(pids))
    for pid in pids:
        links = [_target(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
        total["sockets"] += sum(link.startswith("socket:") for link in links)
        total["files"] += len(links)
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        total["rings"] += sum("memfd:pdserve" in line for line in maps)
    return dict(total)


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # closed meanwhile
        return ""


def traces() -> set[str]:
    """Names outside of any process: files in /tmp and /dev/shm. Not the cluster's own run folder in /tmp,
    whose name only its owner knows."""
    return {
        str(path)
        for room in ("/tmp", "/dev/shm")
        for path in Path(room).iterdir()
        if path.name.startswith(TEMP_PREFIXES)
    }
