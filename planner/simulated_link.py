"""The wire between two workers: a connection for the control stream, and a staging ring that both see."""

from typing import Any

from ..kv_transfer.inbound import InboundPair
from ..kv_transfer.outbound import OutboundPair
from ..kv_transfer.protocol import Connect, Connected, Refused
from .faults import Faults
from .network import End, Network
from .simulated_worker import SimulatedWorker
from .virtual_time import Timer

PREPARE_S = 0.001  # making a ring


class SharedRing:
    """Implements `kv_transfer.link.Link` for both sides, as shared memory does."""

    executor = None
    is_gone = True  # nothing of it needs to be waited for

    def __init__(self, num_slots: int, slot_bytes: int, faults: Faults) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = bytearray(num_slots * slot_bytes)
        self._faults = faults

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return memoryview(self._memory)[start : start + num_bytes]

    def send(self, slot: int, num_bytes: int, seq: int) -> None:
        if self._faults.corrupts_chunk():
            self._memory[slot * self.slot_bytes + num_bytes // 2] ^= 0x10

    def recv(self, slot: int, num_bytes: int, seq: int) -> None: ...

    def wait(self, ticket: Any, timeout_s: float) -> None:
        raise AssertionError("shared memory has no tickets")

    def kill(self) -> None: ...

    def join(self) -> None: ...


class SimulatedDial:
    """One attempt to connect; the doors of both sides, production's `Dialler` and `Acceptor`, in virtual time."""

    def __init__(
        self,
        network: Network,
        source: SimulatedWorker,
        target: SimulatedWorker | None,
        pair: OutboundPair,
        epoch: int,
    ) -> None:
        self._network, self._source, self._target, self._pair, self._epoch = network, source, target, pair, epoch
        self._ring: SharedRing | None = None
        self._is_over = False
        self._timer: Timer | None = None
        self._end: End | None = None
        if target is None or not target.process.is_alive:
            source.process.call_later(network.faults.latency_s(), lambda: self._fail("connection refused"))
            return
        self._end, door = network.connect(source.process, target.process)
        self._end.on_message, self._end.on_lost = self._on_answer, self._fail
        door.on_message = lambda message: self._on_greeting(door, message)
        timeout_s = source.local.config.connect_timeout_s
        self._timer = source.process.call_later(timeout_s, lambda: self._fail(f"no answer within {timeout_s} s"))
        self._end.send(pair.greeting("shm", epoch))

    def cancel(self) -> None:
        self._finish()
        if self._end is not None:
            self._end.close()

    # on the target

    def _on_greeting(self, door: End, message: Any) -> None:
        assert self._target is not None
        if not isinstance(message, Connect):
            return
        pair = self._target.hub.admit(message)
        if isinstance(pair, str):
            door.send(Refused(pair))
            door.close()
            return
        pair.is_preparing = True
        self._target.process.call_later(PREPARE_S, lambda: self._attach(door, pair, message))

    def _attach(self, door: End, pair: InboundPair, connect: Connect) -> None:
        assert self._target is not None
        pair.is_preparing = False
        if connect.epoch != pair.last_epoch or not door.is_open:
            door.close()
            return
        config = self._target.local.config
        self._ring = SharedRing(config.ring_slots, config.chunk_bytes_of("shm"), self._network.faults)
        door.send(Connected(connect.epoch))
        pair.attach(door, self._ring, connect.epoch)

    # on the source

    def _on_answer(self, answer: Any) -> None:
        if self._is_over:
            return
        if isinstance(answer, Refused):
            self._fail(f"refused: {answer.error}")
        elif isinstance(answer, Connected):
            assert self._ring is not None and self._end is not None
            self._finish()
            self._pair.connected(self._end, self._ring, self._epoch, ())
        else:
            self._fail(f"the peer answered {type(answer).__name__}, expected Connected")

    def _fail(self, error: str) -> None:
        if self._is_over:
            return
        self.cancel()
        self._pair.not_connected(error)

    def _finish(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
