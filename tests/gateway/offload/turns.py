"""Counts the loop's work in a single turn, which all streams of all clients wait for. No clock is involved.

Three counts, each of which catches what the others miss:

- lines of Python that were run, by `sys.settrace`: loops over what a client sent, whoever's code they are in;
- blocks that Python's allocator has given out: calls into C that make many objects (parsers), as each of
  them takes a block or more. Threads allocate, too, so this one is an upper bound;
- the sizes of what was handed to C calls that make few objects but work on all: texts that are tokenised, ids
  decoded, bytes that are parsed. They are at few places, which are patched here (`SIZED`).

The remainder is calls into C that take a nanosecond per byte: copies, comparisons, UTF-8. A message of 16 MiB
takes at most 10 ms of them."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from pdserve.gateway.http import bodies
from pdserve.gateway.offload import offload, work
from pdserve.gateway.text.tokenizer import Tokenizer
from tests.gateway import support


@dataclass
class Counts:
    """The work of one turn, or the maximum over all turns."""

    lines: int = 0
    blocks: int = 0
    bytes_parsed: int = 0
    chars_encoded: int = 0
    ids_decoded: int = 0

    def take_max(self, other: "Counts") -> None:
        for name in vars(self):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    def excess(self, bound: "Counts") -> dict[str, int]:
        """Returns the counts that exceed those of `bound`."""
        return {name: count for name, count in vars(self).items() if count > getattr(bound, name)}


class Meter:
    """Counts the work of the loop on this thread."""

    def __init__(self) -> None:
        self.turn = Counts()
        self.most = Counts()
        self._thread = threading.get_ident()

    def count(self, name: str, size: int) -> None:
        """Records work of `size`, if it is done on the loop."""
        if threading.get_ident() == self._thread:
            setattr(self.turn, name, getattr(self.turn, name) + size)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename == support.__file__:
            return None  # the scripted cluster is not part of the gateway
        self.turn.lines += 1
        return self.trace

    def run(self, handle: asyncio.Handle, run: Callable[[asyncio.Handle], None]) -> None:
        self.turn = Counts()
        blocks = sys.getallocatedblocks()
        sys.settrace(self.trace)
        try:
            run(handle)
        finally:
            sys.settrace(None)
            self.turn.blocks = sys.getallocatedblocks() - blocks
            self.most.take_max(self.turn)


@contextmanager
def metered(patch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """Observes all turns of this thread's loop from now on."""
    meter = Meter()
    run = asyncio.Handle._run
    patch.setattr(asyncio.Handle, "_run", lambda handle: meter.run(handle, run))
    for owner, name, counted, argument in SIZED:
        patch.setattr(owner, name, _sized(meter, getattr(owner, name), counted, argument))
    yield meter
    patch.undo()


SIZED: list[tuple[Any, str, str, int]] = [
    (Tokenizer, "_encoding", "chars_encoded", 1),
    (Tokenizer, "decode", "ids_decoded", 1),
    (offload, "read_body", "bytes_parsed", 1),
    (offload, "parsed", "bytes_parsed", 1),
]
assert vars(offload)["read_body"] is bodies.read_body and vars(offload)["parsed"] is work.parsed


def _sized(meter: Meter, function: Callable[..., Any], counted: str, argument: int) -> Callable[..., Any]:
    def sized(*arguments: Any, **named: Any) -> Any:
        meter.count(counted, len(arguments[argument]))
        return function(*arguments, **named)

    return sized
