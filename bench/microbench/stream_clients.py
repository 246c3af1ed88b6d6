"""Cheap stream clients for `streaming.py`: they write and read raw bytes, and count events."""

import asyncio
import json
import struct
from dataclasses import dataclass

from pdserve.proto import pdserve_pb2 as pb

PROMPT_TOKENS = [100 + i for i in range(16)]


@dataclass
class Count:
    """The totals received by all clients."""

    num_events: int = 0
    num_ended: int = 0


async def over_http(num_tokens: int, port: int, count: Count) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    content = json.dumps(
        {"prompt": PROMPT_TOKENS, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    tail = b""
    while data := await reader.read(1 << 18):
        seen = tail + data
        count.num_events += seen.count(b"\ndata: ") - tail.count(b"\ndata: ")
        tail = seen[-32:]
        if b"data: [DONE]" in tail or b"HTTP/1.1 503" in data[:12]:
            break
    count.num_ended += 1
    writer.close()


async def over_grpc(requests: list[pb.GenerateRequest], port: int, count: Count) -> None:
    """Runs all streams on one connection, with windows that never close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, struct.pack(">HI", 4, 2**31 - 1)))
    writer.write(_frame(8, 0, 0, struct.pack(">I", 2**31 - 1 - 65535)))
    for number, request in enumerate(requests):
        message = request.SerializeToString()
        stream = 2 * number + 1
        writer.write(
            _frame(1, 4, stream, _headers())
            + _frame(0, 1, stream, struct.pack(">BI", 0, len(message)) + message)
        )
    rest = b""
    while count.num_ended < len(requests) and (data := await reader.read(1 << 18)):
        rest += data
        at = 0
        while len(rest) - at >= 9:
            size = int.from_bytes(rest[at : at + 3], "big")
            if len(rest) - at < 9 + size:
                break
            kind, flags = rest[at + 3], rest[at + 4]
            if kind == 0:
                count.num_events += _num_messages(rest[at + 9 : at + 9 + size])
            elif kind == 1 and flags & 1:
                count.num_ended += 1
            elif kind in (4, 6) and not flags & 1:
                writer.write(_frame(kind, 1, 0, b"" if kind == 4 else rest[at + 9 : at + 9 + size]))
            at += 9 + size
        rest = rest[at:]
    writer.close()


def _num_messages(data: bytes) -> int:
    """Messages are small here: none is spread over two frames, but for some that a full frame cuts."""
    num, at = 0, 0
    while at + 5 <= len(data):
        at += 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        num += 1
    return num


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _headers() -> bytes:
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/pdserve.v1.Generation/GenerateStream"),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return b"".join(
        b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields
    )
