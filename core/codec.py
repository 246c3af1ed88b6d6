"""Frames on a stream: length and number, four little-endian bytes each, and one msgpack message. Pure: bytes
in, messages out.

Numbers count the frames of one direction. A stream that lost, repeated or swapped a frame is broken,
whichever side is at fault: its reader reports that instead of guessing, and all layers above may rely on
having received every earlier message."""

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")
_HEADER = struct.Struct("<II")
MAX_FRAME_BYTES = 64 << 20
_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """The peer sent data that is not a frame of this protocol; the stream can no longer be trusted."""


class FrameEncoder:
    """One direction of one stream; not thread-safe."""

    def __init__(self) -> None:
        self._number = 0

    def encode(self, message: object) -> bytes:
        """`message` (a msgspec struct), encoded as the next frame."""
        body = _encoder.encode(message)
        header = _HEADER.pack(len(body), self._number)
        self._number = (self._number + 1) & 0xFFFFFFFF
        return header + body


class FrameDecoder(Generic[T]):
    """Cuts a byte stream into messages of type `kind` (a struct or a tagged union of structs)."""

    def __init__(self, kind: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()
        self._number = 0
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> Iterator[T]:
        """Returns the messages completed by `data`. Raises FrameError for frames that are oversized,
        malformed or out of order."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                length, number = _HEADER.unpack_from(self._buffer, start)
                if length > self._max_frame_bytes:
                    raise FrameError(f"frame of {length} bytes, at most {self._max_frame_bytes} are accepted")
                if number != self._number:
                    raise FrameError(f"frame {number} came, {self._number} was due")
                end = start + _HEADER.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _HEADER.size : end])
                start = end
                self._number = (number + 1) & 0xFFFFFFFF
                try:
                    message = self._decoder.decode(body)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise FrameError(f"malformed frame: {error}") from error
                yield message
        finally:
            del self._buffer[:start]
