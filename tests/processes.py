"""Waiting for processes that are not children of the test."""

import os
import select

from tests.deadlines import WAIT_S


def await_end(pid: int) -> None:
    """Returns when there is no such process (any more). Raises AssertionError when it keeps running."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([descriptor], [], [], WAIT_S)
    finally:
        os.close(descriptor)
    assert readable, f"process {pid} lives on"
