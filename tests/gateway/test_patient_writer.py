"""Clients of streams that stop reading, over gRPC."""

import asyncio
from typing import Any

import pytest

from pdserve.gateway.grpc.patient_writer import PatientWriter
from pdserve.gateway.translate import ClientStalled


class Context:
    """A call whose client has room while `has_room` is set."""

    def __init__(self) -> None:
        self.has_room = asyncio.Event()
        self.written: list[object] = []

    async def write(self, message: object) -> None:
        await self.has_room.wait()
        self.written.append(message)


def writer_to(context: Any, max_unread_s: float) -> PatientWriter:
    return PatientWriter(context, max_unread_s)


async def test_a_client_without_room_is_given_up_after_a_while() -> None:
    async with writer_to(Context(), 0.01) as writer:
        with pytest.raises(ClientStalled):
            await writer.write("token")
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_time_between_writes_does_not_count() -> None:
    context = Context()
    context.has_room.set()
    async with writer_to(context, 0.01) as writer:
        await writer.write("a")
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(0.03, late.set)
        await late.wait()
        await writer.write("b")
    assert context.written == ["a", "b"]


async def test_a_cancelled_call_is_not_taken_for_a_stalled_client() -> None:
    context = Context()

    async def call() -> None:
        async with writer_to(context, 60.0) as writer:
            await writer.write("token")

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
