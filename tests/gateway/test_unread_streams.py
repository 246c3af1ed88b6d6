"""Unread streams of one key, as many as a connection may have, do not affect another key's connections and
calls."""

from pathlib import Path
from typing import Any

import grpc

from pdserve.gateway.app import MAX_STREAMS
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.flooding import PREFACE, as_key, connect, hang_up, request, serving, until
from tests.gateway.support import ScriptedCluster
from tests.gateway.test_unauthenticated_calls import (
    END_HEADERS,
    HEADERS_FRAME,
    SETTINGS_FRAME,
    frame,
    literal,
)

MALLORY, ALICE = new_key(), new_key()
DATA_FRAME, END_STREAM, ACK = 0, 1, 1
STREAM = pb.GenerateRequest(prompt=pb.Prompt(text="the dog"), sampling=pb.SamplingParams(max_tokens=200))


def streams(count: int) -> bytes:
    """Returns the bytes of GenerateStream calls on one connection."""
    names = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/pdserve.v1.Generation/GenerateStream",
        b":authority": b"x",
    }
    names |= {
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"authorization": b"Bearer " + MALLORY.encode(),
    }
    headers = b"".join(literal(name, value, True) for name, value in names.items())
    again = bytes(0x80 | 62 + index for index in reversed(range(len(names))))
    text = STREAM.SerializeToString()
    message = b"\0" + len(text).to_bytes(4) + text
    sent = [PREFACE + frame(SETTINGS_FRAME, 0, 0, b"") + frame(SETTINGS_FRAME, ACK, 0, b"")]
    for index in range(count):
        stream = 1 + 2 * index
        sent.append(frame(HEADERS_FRAME, END_HEADERS, stream, again if index else headers))
        sent.append(frame(DATA_FRAME, END_STREAM, stream, message))
    return b"".join(sent)


async def test_unread_streams_of_one_key_keep_no_other_key_out(
    cluster: ScriptedCluster, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(
        "".join(f"{make_key(name, key).line}\n" for name, key in (("mallory", MALLORY), ("alice", ALICE)))
    )
    path.chmod(0o600)
    cluster.num_extra_logprobs = 200  # one message fills a connection's buffers
    listen: dict[str, Any] = {"api_keys": str(path)}
    async with serving(cluster, listen) as server:
        opened = await connect(server.grpc_address, 1)
        writer = opened[0][1]
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(streams(MAX_STREAMS))
        await until(lambda: len(cluster.requests) == MAX_STREAMS)
        for _ in range(3):
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                stub = pdserve_pb2_grpc.GenerationStub(channel)
                assert len((await stub.Generate(request(), metadata=as_key(ALICE))).choices) == 1
                assert [event async for event in stub.GenerateStream(request(), metadata=as_key(ALICE))]
        assert len(cluster.closed) == 6, "the streams that nobody reads are open all the while"
        hang_up(opened)
