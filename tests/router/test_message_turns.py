"""The head's loop handles what workers send a little at a time, all connections in turns, and loses none of
it."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

from pdserve.core.messages import Hello, Ready, StepReport, WorkerLoad
from pdserve.router.core import Router
from pdserve.router.events import RouterEvent, WorkerLost
from pdserve.router.message_turns import MAX_S, MIN_S, MessageTurns
from pdserve.router.service import RouterService
from pdserve.worker.router_link import RouterLink

from .cluster import worker_info

REPORT = StepReport(worker_id="both-0", incarnation=1, load=WorkerLoad())


class Machine:
    """A clock that moves only as work is done."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done: list[str] = []

    def messages(self, name: str, count: int, cost_s: float) -> Iterator[None]:
        for _ in range(count):
            self.now_s += cost_s
            self.done.append(name)
            yield


async def num_turns(machine: Machine, num_messages: int, others_s: float = 0.0) -> int:
    """Returns the turns until that many are handled; in each one, all else takes `others_s`."""
    count = 0
    while len(machine.done) < num_messages:
        await asyncio.sleep(0)
        machine.now_s += others_s
        count += 1
    return count


async def test_a_backlog_is_handled_over_many_turns() -> None:
    machine = Machine()
    MessageTurns(lambda: machine.now_s).run(machine.messages("a", 100, MIN_S / 3.5))
    assert len(machine.done) == 4
    assert await num_turns(machine, 100) == 24


async def test_messages_get_as_much_time_as_all_else_up_to_a_bound() -> None:
    for others_s, per_turn in ((3 * MIN_S, 3), (2 * MAX_S, round(MAX_S / MIN_S))):
        machine = Machine()
        MessageTurns(lambda machine=machine: machine.now_s).run(machine.messages("a", 1000, MIN_S * 1.0001))
        assert len(machine.done) == 1
        assert await num_turns(machine, 1000, others_s) in (-(-999 // per_turn), -(-999 // per_turn) + 1)


async def test_connections_take_turns() -> None:
    machine = Machine()
    turns = MessageTurns(lambda: machine.now_s)
    for name in "ab":
        turns.run(machine.messages(name, 3, MIN_S))
    await num_turns(machine, 6)
    assert "".join(machine.done) == "aababb"


async def test_an_error_of_one_connection_does_not_stop_the_others() -> None:
    errors: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    machine = Machine()
    turns = MessageTurns(lambda: machine.now_s)

    def failing() -> Iterator[None]:
        yield from machine.messages("a", 1, MIN_S)
        raise ValueError

    turns.run(failing())
    turns.run(machine.messages("b", 3, MIN_S))
    await num_turns(machine, 4)
    assert [type(error["exception"]) for error in errors] == [ValueError]


class Recorded(RouterService):
    """Records the router's events."""

    def __init__(self) -> None:
        observer = SimpleNamespace(expects=lambda key: True, handle=lambda event: None)
        super().__init__(Router(), observer, "token")
        self.events: list[RouterEvent] = []
        self.has_lost = asyncio.Event()

    def handle(self, event: RouterEvent) -> None:
        self.events.append(event)
        super().handle(event)
        if isinstance(event, WorkerLost):
            self.has_lost.set()


async def test_messages_of_a_lost_worker_are_handled_before_its_loss() -> None:
    service = Recorded()
    ticks = iter(range(10**9))
    service.message_turns = MessageTurns(lambda: float(next(ticks)))  # one message a turn
    port = await service.start("127.0.0.1")
    hello = Hello(worker_id="both-0", incarnation=1)
    link = await asyncio.to_thread(
        RouterLink, ("127.0.0.1", port), "token", hello, lambda command: None, lambda link: None
    )
    link.start()
    await asyncio.to_thread(link.send, Ready(info=worker_info("both-0")), *[REPORT] * 300)
    await asyncio.to_thread(link.close)
    await asyncio.wait_for(service.has_lost.wait(), 30)
    assert sum(isinstance(event, StepReport) for event in service.events) == 300
    await service.stop()
