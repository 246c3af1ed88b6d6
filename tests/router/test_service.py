"""The router's shell: commands are carried out in the order of decision, even when one leads to another
event."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.core.errors import DuplicateRequest
from pdserve.core.held_bytes import TooManyBytes
from pdserve.core.messages import (
    Abort,
    HeldLeg,
    Hello,
    Leg,
    LegEnded,
    Prefill,
    Serve,
    StepReport,
    TokenOutput,
    WorkerCommand,
    WorkerLoad,
)
from pdserve.core.request import Request, SamplingParams, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import (
    Adopted,
    EmitEnd,
    EmitTokens,
    Submit,
    Timeline,
    WorkerIdle,
    WorkerReady,
    WorkersExpected,
)
from pdserve.router.service import RouterService

from .cluster import make_request, worker_info

OBSERVER = SimpleNamespace(expects=lambda key: True, handle=lambda event: None)
TOKENS = EmitTokens("r", 0, (TokenOutput(TransferId("r", 0), 0, 0, 7),))
END = EmitEnd(
    "r", None, None, Timeline(request_id="r", submitted_s=0.0, first_token_s=None, ended_s=0.0, dispatches=())
)


class ScriptedRouter:
    """A worker becomes idle before a token is emitted; the stream's end follows from the observer's
    reaction."""

    config = RouterConfig()
    is_adopting = False

    def handle(self, event: object, now_s: float) -> list[Any]:
        match event:
            case Submit():
                return [WorkerIdle("decode-0", 1), TOKENS]
            case WorkersExpected():
                return [END]
            case _:
                return []

    def next_tick_s(self) -> None:
        return None


async def test_commands_caused_by_an_observer_follow_those_decided_before() -> None:
    service: RouterService
    observer = SimpleNamespace(
        expects=lambda key: True, handle=lambda event: service.handle(WorkersExpected(0))
    )
    service = RouterService(ScriptedRouter(), observer, "token")  # type: ignore[arg-type]
    request = Request(
        request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1), eos_token_ids=()
    )
    assert [event async for event in service.generate(request)] == [TOKENS, END]


class TokenMachine:
    """A fake connection to a worker that serves both phases: a token for each of its streams at each step."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._next: dict[TransferId, int] = {}  # transfer -> index of its next token
        self.num_sent = 0

    def connect(self) -> None:
        sessions: Any = self._service.sessions
        sessions.opened(self, 0.0)
        sessions.received(self, Hello(worker_id="both-0", incarnation=1))

    def send(self, command: WorkerCommand) -> None:
        match command:
            case Serve(spec=spec) | Prefill(spec=spec):
                self._next[spec.transfer] = len(spec.output_token_ids)
            case Abort(transfer=transfer) if self._next.pop(transfer, None) is not None:
                ended = LegEnded(
                    worker_id="both-0", incarnation=1, transfer=transfer, leg=Leg.DECODE, error="aborted"
                )
                asyncio.get_running_loop().call_soon(self._service.handle, ended)

    def goes_on(self, transfer: TransferId, index: int) -> None:
        """Adds a stream that the worker already holds."""
        self._next[transfer] = index

    def step(self) -> None:
        outputs = tuple(
            TokenOutput(transfer, 0, index, index, None) for transfer, index in self._next.items()
        )
        self._next = {transfer: index + 1 for transfer, index in self._next.items()}
        self.num_sent += len(outputs)
        self._service.handle(
            StepReport(worker_id="both-0", incarnation=1, load=WorkerLoad(), outputs=outputs)
        )


@pytest.fixture
def served() -> tuple[RouterService, TokenMachine]:
    """A service with one worker that has room for two streams, each of which may have 20 unread tokens."""
    service = RouterService(Router(RouterConfig(max_unread_tokens=20)), OBSERVER, "token")
    machine = TokenMachine(service)
    machine.connect()
    return service, machine


async def settle() -> None:
    """Lets all tasks run until they block."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_slow_reader_is_set_aside_without_harm_to_others(
    served: tuple[RouterService, TokenMachine],
) -> None:
    service, machine = served
    service.handle(WorkerReady(worker_info("both-0", max_batch_size=2)))
    read: dict[str, list[int]] = {"fast": [], "third": []}

    async def reader(name: str) -> None:
        async for event in service.generate(make_request(name, max_tokens=1000)):
            if isinstance(event, EmitTokens):
                read[name] += [token.index for token in event.tokens]

    unread = service.generate(make_request("unread", max_tokens=1000))
    first = asyncio.ensure_future(anext(unread))
    readers = [asyncio.ensure_future(reader("fast"))]
    await settle()
    for step in range(200):
        machine.step()
        await settle()
        assert read["fast"] == list(range(step + 1))  # a token of each step, at once
        if step == 100:  # the slow reader's place is free
            readers.append(asyncio.ensure_future(reader("third")))
            await settle()
    await first
    assert service._streams["unread"].num_unread == 21
    assert service.router.counters.unread == 1
    assert read["third"] == list(range(99))
    assert machine.num_sent == 200 + 99 + 22
    for task in readers:
        task.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await unread.aclose()
    await settle()
    assert service.router.status(0.0).num_requests == 0


async def test_a_client_that_reads_again_gets_every_token_once(
    served: tuple[RouterService, TokenMachine],
) -> None:
    service, machine = served
    service.handle(WorkerReady(worker_info("both-0")))
    stream = service.generate(make_request("slow", max_tokens=1000))
    first = asyncio.ensure_future(anext(stream))
    indices: list[int] = []
    while len(indices) < 300:
        for _ in range(30):  # faster than the client reads
            await settle()
            machine.step()
        event = await (first if not indices else anext(stream))
        assert isinstance(event, EmitTokens)
        indices += [token.index for token in event.tokens]
        assert service._streams["slow"].num_unread <= 21
    assert indices == list(range(len(indices)))
    assert service.router.counters.unread > 10
    await stream.aclose()


async def test_a_client_that_leaves_too_much_unread_loses_the_stream_that_adds_to_it() -> None:
    service = RouterService(Router(RouterConfig(max_unread_bytes=4 << 20)), OBSERVER, "token")  # 1 MiB of one
    machine = TokenMachine(service)
    machine.connect()
    service.handle(WorkerReady(worker_info("both-0", num_blocks=1024)))
    opened = [
        service.generate(make_request(f"unread{index}", client="mallory", max_tokens=2000))
        for index in range(4)
    ]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in opened]
    innocent = service.generate(make_request("alice", client="alice", max_tokens=2000))
    indices: list[int] = []
    first = asyncio.ensure_future(anext(innocent))
    await settle()
    for _ in range(900):
        machine.step()
        event = await (first if not indices else anext(innocent))
        assert isinstance(event, EmitTokens)
        indices += [token.index for token in event.tokens]
        assert service._unread.total <= 1 << 20
    assert indices == list(range(900))
    for first in firsts:
        await first
    lost = [stream for stream in service._streams.values() if stream._overflow is not None]
    assert len(lost) in (2, 3) and service.router.status(0.0).num_requests == 5 - len(lost)
    refused = 0
    for stream in opened:
        try:
            await anext(stream)
        except TooManyBytes:
            refused += 1
        await stream.aclose()
    assert refused == len(lost)
    await innocent.aclose()
    assert service._unread.total == 0


@pytest.fixture
def took_over() -> tuple[RouterService, TokenMachine]:
    """A service whose worker has produced 50 tokens of request `r` while there was no router, and
    continues."""
    router = Router(RouterConfig(max_unread_tokens=20), first_attempt=1000, adopts=True)
    service = RouterService(router, OBSERVER, "token")
    machine = TokenMachine(service)
    machine.connect()
    return service, machine


def adopt(service: RouterService, machine: TokenMachine) -> None:
    request = make_request(max_tokens=1000)
    spec = SequenceSpec(
        transfer=TransferId("r", 0),
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        choices=(0,),
    )
    outputs = tuple(TokenOutput(spec.transfer, 0, index, index) for index in range(50))
    machine.goes_on(spec.transfer, len(outputs))
    held = HeldLeg.of(spec, Leg.DECODE, outputs, has_partner=False)
    service.handle(WorkerReady(worker_info("both-0"), (held,)))
    service.handle(Adopted())


async def test_events_handed_to_a_returning_client_do_not_count_as_unread(
    took_over: tuple[RouterService, TokenMachine],
) -> None:
    service, machine = took_over
    adopt(service, machine)
    stream = service.generate(make_request(max_tokens=1000))
    first = await anext(stream)
    assert isinstance(first, EmitTokens) and first.tokens[0].index == 0
    for _ in range(20):
        machine.step()
        await settle()
    assert service.router.counters.unread == 0
    machine.step()
    assert service.router.counters.unread == 1  # counts later tokens only
    indices = [token.index for token in first.tokens]
    while len(indices) < 71:
        event = await anext(stream)
        assert isinstance(event, EmitTokens)
        indices += [token.index for token in event.tokens]
    assert indices == list(range(71))
    await stream.aclose()


async def test_a_refused_duplicate_leaves_the_live_request_alone(
    took_over: tuple[RouterService, TokenMachine],
) -> None:
    service, machine = took_over
    adopt(service, machine)
    with pytest.raises(DuplicateRequest):
        await anext(service.generate(make_request(num_tokens=21, max_tokens=1000)))
    machine.step()
    stream = service.generate(make_request(max_tokens=1000))
    indices: list[int] = []
    while len(indices) < 51:
        event = await anext(stream)
        assert isinstance(event, EmitTokens)
        indices += [token.index for token in event.tokens]
    assert indices == list(range(51))
    assert service.router.counters.dispatched == 0
    await stream.aclose()
