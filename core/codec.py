"""Frames on a stream: a 4-byte little-endian length and one msgpack message. Pure: bytes in, messages out."""

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")
_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20
_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """The peer sent what is not a frame of this protocol; the stream cannot be trusted any more."""


def encode_frame(message: object) -> bytes:
    """`message` (a msgspec struct) as one frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[T]):
    """Cuts a byte stream into messages of type `kind` (a struct or a tagged union of structs)."""

    def __init__(self, kind: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages completed by `data`. Raises FrameError for oversized or malformed frames."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > self._max_frame_bytes:
                    raise FrameError(f"frame of {length} bytes, at most {self._max_frame_bytes} are accepted")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                try:
                    message = self._decoder.decode(body)
                except msgspec.MsgspecError as error:
                    raise FrameError(f"malformed frame: {error}") from error
                yield message
        finally:
            del self._buffer[:start]
