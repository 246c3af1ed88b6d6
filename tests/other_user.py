"""Acts as another, unprivileged local user, to test access to our files and sockets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NOBODY = 65534
_AS_NOBODY = f"""
import errno, os, socket, sys
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})

def attempt(name, action):
    try:
        action()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "done")

def connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
"""


def needs_root() -> None:
    """Skips a test that gives something to another user, or acts as one."""
    if os.getuid() != 0:
        pytest.skip("only root can act as another local user")


def run_as_nobody(code: str, *arguments: str) -> list[str]:
    """Returns the lines that `code` prints when another user runs it. It may use `attempt(name, action)` and
    `connect(path)`."""
    needs_root()
    command = [sys.executable, "-c", _AS_NOBODY + code, *arguments]
    return subprocess.run(command, cwd="/", check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


@contextmanager
def listening_as_nobody() -> Iterator[int]:
    """The port on loopback on which another user's process listens."""
    needs_root()
    code = (
        "sock = socket.create_server(('127.0.0.1', 0)); print(sock.getsockname()[1], flush=True);"
        " sys.stdin.read()"
    )
    command = [sys.executable, "-c", _AS_NOBODY + code]
    with subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        yield int(process.stdout.readline())
        process.stdin.close()
