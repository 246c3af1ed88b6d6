"""Waiting for processes that are not children of the test."""

import os
import select


def await_end(pid: int) -> None:
    """Returns when there is no such process (any more). Raises AssertionError when it keeps running."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([descriptor], [], [], 30.0)
    finally:
        os.close(descriptor)
    assert readable, f"process {pid} lives on"
