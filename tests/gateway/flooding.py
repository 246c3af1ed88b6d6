"""Clients that hold connections open, and a server with limits of a test's choice."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pdserve.gateway.app import GatewayServer, serve
from pdserve.proto import pdserve_pb2 as pb
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(text="the dog"), sampling=pb.SamplingParams(max_tokens=2), **fields
    )


def as_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def serving(
    cluster: ScriptedCluster, listen: dict[str, Any] | None = None, **limits: float
) -> AsyncIterator[GatewayServer]:
    changes = {
        "limits": CONFIG.limits.model_copy(update=limits),
        "listen": CONFIG.listen.model_copy(update=listen or {}),
    }
    gateway = await serve(
        cluster, CONFIG.model_copy(update=changes), cluster.tokenizer, model_info(cluster.tokenizer)
    )
    try:
        yield gateway
    finally:
        await gateway.stop(0)


async def connect(address: str, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    return [await asyncio.open_connection(host, int(port)) for _ in range(count)]


async def first_to_end(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> int:
    """Returns the first connection that its server closes."""
    reads = {asyncio.create_task(until_closed(reader)): index for index, (reader, _) in enumerate(opened)}
    done, pending = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED, timeout=WAIT_S)
    for task in pending:
        task.cancel()
    return min(reads[task] for task in done)


async def until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1 << 16):
            pass
    except ConnectionError:
        pass


async def until(holds: Callable[[], bool]) -> None:
    loop, held = asyncio.get_running_loop(), asyncio.Event()

    def look() -> None:
        if holds():
            held.set()
        else:
            loop.call_soon(look)

    look()
    await asyncio.wait_for(held.wait(), WAIT_S)


def hang_up(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in opened:
        writer.transport.abort()
