"""The processes below another one, as Linux lists them."""

from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, their children and so on, parents first."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = _children(waiting.pop(0))
        found += children
        waiting += children
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found
