"""Clients on the head's host, whose streams must not notice what happens to hosts."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from .network import BUSY_S, Hosts


def first_answer(hosts: Hosts) -> str:
    """Asks until the head answers."""
    text: str = json.loads(hosts.run("head", "python -m tests.hosts.ask once"))
    return text


@contextmanager
def clients(hosts: Hosts, expected: str, number: int = 1) -> Iterator[None]:
    """While the block runs, clients ask for the same answer, each again once it has it. All answers must be the
    expected one."""
    command = hosts.command("head", f"python -m tests.hosts.ask until-stopped {number}")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        try:
            yield
            answers = asking.communicate("stop\n", timeout=BUSY_S)[0]
        finally:
            asking.kill()
    assert asking.returncode == 0, "a stream ended with an error"
    assert json.loads(answers) == [expected]
