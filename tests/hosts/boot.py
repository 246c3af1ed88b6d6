"""The first process of a host: mounts what is the host's own, starts sshd and cron, and reaps orphans until
it is killed.

    boot.py FOLDER NAME [KEPT ...]

Prints a line when the host answers ssh. FOLDER is the host's part of the machine's disk. KEPT are folders of
the machine (code, virtual environment) that stay visible where the host has a folder of its own around them.
Runs in fresh mount, PID, UTS, IPC and network namespaces."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

VOLATILE = {"/tmp": "mode=1777,size=1g", "/dev/shm": "mode=1777,size=2g", "/run": "mode=755,size=64m"}
LASTING = {"/root": "home", "/var/spool/cron/crontabs": "crontabs"}
FILES = {"/etc/hosts": "hosts", "/etc/hostname": "name"}


def mount_all(folder: Path, kept: list[Path]) -> None:
    _mount("--make-rprivate", "/")
    stage = folder / "stage"
    sources = [(target, ["-t", "tmpfs", "-o", options, "tmpfs"]) for target, options in VOLATILE.items()]
    sources += [(target, ["--bind", str(folder / name)]) for target, name in LASTING.items()]
    for target, source in sources:
        _mount(*source, stage)
        for path in kept:
            if path.is_relative_to(target):
                inside = stage / path.relative_to(target)
                inside.mkdir(parents=True, exist_ok=True)
                _mount("--bind", path, inside)
        _mount("--move", stage, target)
    for target, name in FILES.items():
        if Path(target).exists():
            _mount("--bind", folder / name, target)
    _mount("-t", "proc", "proc", "/proc")


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", "-n", *arguments], check=True)


def start_daemons(folder: Path) -> None:
    Path("/run/sshd").mkdir()
    options = {
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": ".ssh/authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "PidFile": "none",
        "MaxStartups": "100",
        "Subsystem": "sftp internal-sftp",
    }
    sshd = [
        "/usr/sbin/sshd",
        "-D",
        "-f",
        "/dev/null",
        *(f"-o{name}={value}" for name, value in options.items()),
    ]
    for daemon in (sshd, ["/usr/sbin/cron", "-f"]):  # cron also runs, now, what is scheduled for @reboot
        subprocess.Popen(daemon, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def await_ssh() -> None:
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", 22)):
            return
        time.sleep(0.01)


def main(folder: Path, name: str, kept: list[Path]) -> None:
    socket.sethostname(name)
    mount_all(folder, kept)
    start_daemons(folder)
    await_ssh()
    print("ready", flush=True)
    while True:
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [Path(path) for path in sys.argv[3:]])
