"""The connection between router and worker: both ends send heartbeats, and each notices the other's
silence."""

import asyncio
import socket
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from pdserve.core.codec import FrameEncoder
from pdserve.core.handshake import OPENING_BYTES, HandshakeDialler, Purpose
from pdserve.core.messages import (
    Abort,
    Heartbeat,
    HeldLeg,
    Hello,
    Holds,
    Leg,
    Ready,
    Role,
    StepReport,
    WorkerCommand,
    WorkerLoad,
)
from pdserve.core.request import TransferId
from pdserve.router import worker_sessions
from pdserve.router.core import Router
from pdserve.router.events import Adopted, WorkerReady
from pdserve.router.service import RouterService
from pdserve.router.supervisor import ConnectionLost
from pdserve.worker import router_link as worker_link, router_session
from pdserve.worker.router_link import RouterLink

from ..deadlines import WAIT_S
from ..handshakes import greeted, open_control
from ..router.cluster import worker_info
from ..worker.chain_model import spec

HELLO = Hello(worker_id="decode-0", incarnation=1)


class WorkerEnd:
    """A worker's end, and the messages that it received."""

    def __init__(self, port: int) -> None:
        self.commands: list[WorkerCommand] = []
        self.lost = threading.Event()
        self.link = RouterLink(
            ("127.0.0.1", port), "token", HELLO, self.commands.append, lambda _: self.lost.set()
        )
        self.link.start()


def observer(lost: list[str]) -> SimpleNamespace:
    return SimpleNamespace(
        expects=lambda key: True,
        handle=lambda event: lost.append(event.reason) if isinstance(event, ConnectionLost) else None,
    )


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed soon."""
    monkeypatch.setattr(worker_link, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(router_session, "DEAD_AFTER_S", 0.3)
    monkeypatch.setattr(worker_sessions, "HEARTBEAT_S", 0.02)


async def read_beats(reader: asyncio.StreamReader, count: int) -> None:
    """Raises IncompleteReadError when the router hangs up before."""
    await reader.readexactly(count * len(FrameEncoder().encode(Heartbeat())))


async def test_an_idle_router_sends_heartbeats(hasty: None) -> None:
    routing = RouterService(Router(), observer([]), "token")
    reader, writer = await open_control(await routing.start("127.0.0.1"), "token")
    writer.write(FrameEncoder().encode(HELLO))
    async with asyncio.timeout(WAIT_S):
        await read_beats(reader, 3)
    writer.close()
    await routing.stop()


async def test_a_worker_that_falls_silent_is_lost(hasty: None) -> None:
    lost: list[str] = []
    routing = RouterService(Router(), observer(lost), "token")
    reader, writer = await open_control(await routing.start("127.0.0.1"), "token")
    encoder = FrameEncoder()
    writer.write(encoder.encode(HELLO) + encoder.encode(Ready(info=worker_info("decode-0", Role.DECODE))))
    async with asyncio.timeout(WAIT_S):
        await reader.read(-1)
    assert len(lost) == 1 and lost[0].startswith("silent")
    writer.close()
    await routing.stop()


async def test_a_router_does_not_mistake_its_own_pause_for_workers_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[str] = []
    routing = RouterService(Router(), observer(lost), "token")
    reader, writer = await open_control(await routing.start("127.0.0.1"), "token")
    encoder = FrameEncoder()
    writer.write(encoder.encode(HELLO) + encoder.encode(Ready(info=worker_info("decode-0", Role.DECODE))))
    async with asyncio.timeout(WAIT_S):
        await read_beats(reader, 1)
    loop = asyncio.get_running_loop()
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + 60.0)
    async with asyncio.timeout(WAIT_S):
        await read_beats(reader, 1)
    assert lost == []
    writer.close()
    await routing.stop()


def test_a_worker_that_receives_nothing_has_lost_its_router(hasty: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with greeted(silent, "token") as accepted:
            link = WorkerEnd(silent.getsockname()[1])
        with accepted.get():
            assert link.lost.wait(WAIT_S)
            link.link.close()


async def test_the_router_hangs_up_when_a_frame_was_lost() -> None:
    lost: list[str] = []
    routing = RouterService(Router(), observer(lost), "token")
    reader, writer = await open_control(await routing.start("127.0.0.1"), "token")
    encoder = FrameEncoder()
    writer.write(encoder.encode(HELLO))
    encoder.encode("this frame is lost")
    writer.write(encoder.encode(StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad())))
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    assert lost == ["frame 2 came, 1 was due"]
    writer.close()
    await routing.stop()


def test_a_worker_hangs_up_when_a_frame_was_lost() -> None:
    encoder = FrameEncoder()
    first, _, third = (encoder.encode(Abort(transfer=TransferId("r", attempt))) for attempt in range(3))
    with socket.create_server(("127.0.0.1", 0)) as router:
        with greeted(router, "token") as accepted:
            link = WorkerEnd(router.getsockname()[1])
        with accepted.get() as connection:
            connection.sendall(first + third)
            assert link.lost.wait(WAIT_S)
        link.link.close()
    assert link.commands == [Abort(transfer=TransferId("r", 0))]


async def test_held_legs_arrive_in_several_frames_and_are_adopted_together() -> None:
    router, is_ready, observing = Router(adopts=True), asyncio.Event(), observer([])
    observing.handle = lambda event: is_ready.set() if isinstance(event, WorkerReady) else None
    routing = RouterService(router, observing, "token")
    _, writer = await open_control(await routing.start("127.0.0.1"), "token")
    encoder = FrameEncoder()
    first, second, third = (HeldLeg.of(spec(name, range(4)), Leg.DECODE, has_partner=False) for name in "abc")
    ready = Ready(info=worker_info("decode-0", Role.DECODE), held=(third,))
    for message in (HELLO, Holds(held=(first,)), Holds(held=(second,)), ready):
        writer.write(encoder.encode(message))
    async with asyncio.timeout(WAIT_S):
        await is_ready.wait()
    routing.handle(Adopted())
    (worker,) = router.status(0.0).workers
    assert worker.num_legs == 3
    writer.close()
    await routing.stop()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * OPENING_BYTES,
        HandshakeDialler("token", Purpose.TRANSFER).opening,
        HandshakeDialler("token", Purpose.CONTROL).opening,
        HandshakeDialler("token", Purpose.CONTROL).opening + bytes(32),
        HandshakeDialler("token", Purpose.CONTROL).opening + bytes(1 << 20),
    ],
)
async def test_an_unauthenticated_peer_is_disconnected_whatever_it_sends(hasty: None, said: bytes) -> None:
    lost: list[str] = []
    routing = RouterService(Router(), observer(lost), "token")
    reader, writer = await asyncio.open_connection("127.0.0.1", await routing.start("127.0.0.1"))
    async with asyncio.timeout(WAIT_S):
        with suppress(ConnectionError):
            writer.write(said)
            await reader.read()
    assert lost == [] and routing.sessions.num_unproven == 0
    writer.close()
    await routing.stop()


async def test_a_peer_that_sends_slowly_stays_no_longer_than_a_silent_one(hasty: None) -> None:
    routing = RouterService(Router(), observer([]), "token")
    reader, writer = await asyncio.open_connection("127.0.0.1", await routing.start("127.0.0.1"))
    hung_up = asyncio.ensure_future(reader.read())
    async with asyncio.timeout(WAIT_S):
        while not hung_up.done():
            writer.write(b"p")
            await asyncio.wait((hung_up,), timeout=0.01)
    hung_up.exception()
    writer.close()
    await routing.stop()


async def test_an_unexpected_worker_with_the_token_is_refused(hasty: None) -> None:
    nobody = observer([])
    nobody.expects = lambda key: False
    routing = RouterService(Router(), nobody, "token")
    reader, writer = await open_control(await routing.start("127.0.0.1"), "token")
    writer.write(FrameEncoder().encode(HELLO))
    async with asyncio.timeout(WAIT_S):
        with suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    await routing.stop()


async def test_a_worker_gets_in_past_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_sessions, "MAX_UNPROVEN", 4)
    routing = RouterService(Router(), observer([]), "token")
    port = await routing.start("127.0.0.1")
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
    reader, writer = await open_control(port, "token")
    writer.write(FrameEncoder().encode(HELLO))
    async with asyncio.timeout(WAIT_S):
        await read_beats(reader, 1)
        for oldest, _ in idle[:16]:
            with suppress(ConnectionError):
                assert await oldest.read() == b""
    assert routing.sessions.num_unproven <= 4
    for _, other in [*idle, (reader, writer)]:
        other.close()
    await routing.stop()


async def test_a_flood_of_connections_writes_few_lines_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    routing = RouterService(Router(), observer([]), "token")
    port = await routing.start("127.0.0.1")
    async with asyncio.timeout(WAIT_S):
        for number in range(500):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n" if number % 2 else b"")
            writer.write_eof()
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
    assert routing.sessions.num_refused == 500
    assert len(caplog.records) < 100
    await routing.stop()
