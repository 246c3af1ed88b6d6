"""Acting as another local user, one without rights: what they can do to files and sockets of ours."""

import os
import subprocess
import sys

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
    """The lines that `code` prints when another user runs it. It may use `attempt(name, action)` and `connect(path)`."""
    needs_root()
    command = [sys.executable, "-c", _AS_NOBODY + code, *arguments]
    return subprocess.run(command, cwd="/", check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
