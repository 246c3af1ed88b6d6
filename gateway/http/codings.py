"""Compressed bodies: requests are decoded within limits, answers in JSON encoded where a client accepts it.

Both work in slices, as the head's loop carries all streams."""

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from .errors import HttpRefusal

SLICE_BYTES = 1 << 16
MIN_ENCODED_BYTES = 4096  # of an answer: below, there is nothing to gain
LEVEL = 1
GZIP_BITS, ZLIB_BITS, RAW_BITS = 31, 15, -15
DECODED = (b"gzip", b"x-gzip", b"deflate")
_REFUSED = re.compile(r";\s*q\s*=\s*0(\.0*)?\s*$")


def coding_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Returns the coding of a request's body, which `Decoder` takes; None if there is none. Raises
    HttpRefusal for others."""
    given = [value.strip().lower() for name, value in headers if name == b"content-encoding"]
    if not given or given == [b"identity"]:
        return None
    if len(given) == 1 and given[0] in DECODED:
        return given[0]
    shown = b", ".join(given)[:80].decode("latin-1")
    message = f"content-encoding: {shown!r} is not decoded here, expected gzip, deflate or identity"
    raise HttpRefusal(415, "unsupported_encoding", message, closes=True)


class Decoder:
    """Decodes one body. `deflate` is zlib's format, or the bare one that some clients send."""

    def __init__(self, coding: bytes) -> None:
        self._is_gzip = coding != b"deflate"
        self._stream: Any = zlib.decompressobj(GZIP_BITS) if self._is_gzip else None
        self._first = b""  # bytes that do not tell yet which deflate it is

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields what `data` decodes to, in slices. Raises HttpRefusal."""
        if self._stream is None:
            self._first += data
            if len(self._first) < 2:
                return
            data = self._first
            is_zlib = data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0
            self._stream = zlib.decompressobj(ZLIB_BITS if is_zlib else RAW_BITS)
        while data or not self._stream.eof:
            try:
                piece = self._stream.decompress(data, SLICE_BYTES)
            except zlib.error as error:
                raise _broken(str(error)) from None
            data = self._stream.unconsumed_tail
            if piece:
                yield piece
            elif not data:
                break
        if self._stream.unused_data:
            raise _broken("data behind its end")

    def end(self) -> None:
        """Raises HttpRefusal if the body breaks off."""
        if self._stream is None or not self._stream.eof:
            raise _broken("it breaks off")


def _broken(reason: str) -> HttpRefusal:
    message = f"body: it cannot be decoded ({reason}), expected what content-encoding says"
    return HttpRefusal(400, "invalid_encoding", message, closes=True)


def accepts_gzip(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Returns whether a client takes gzip."""
    for name, value in headers:
        if name == b"accept-encoding":
            for item in value.decode("latin-1").lower().split(","):
                if item.partition(";")[0].strip() in ("gzip", "x-gzip") and not _REFUSED.search(item):
                    return True
    return False


async def gzipped(data: bytes) -> bytes:
    """Returns `data` as gzip, and lets other work go on meanwhile."""
    stream = zlib.compressobj(LEVEL, wbits=GZIP_BITS)
    parts = [stream.compress(part) async for part in _slices(data)]
    return b"".join([*parts, stream.flush()])


async def _slices(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), SLICE_BYTES):
        if start:
            await asyncio.sleep(0)
        yield data[start : start + SLICE_BYTES]
