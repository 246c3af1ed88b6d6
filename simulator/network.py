"""Connections between processes: ordered streams with latency, which faults delay and cut, and whose messages
they drop."""

from collections.abc import Callable
from typing import Any

from .faults import Faults, MessageFault
from .virtual_time import VirtualProcess, VirtualTime


def _ignore(_: Any) -> None: ...


class ConnectionEnd:
    """One side of a connection, with the interface of `kv_transfer.channel.Channel`. `on_lost` is called
    once, unless this side closed."""

    def __init__(self, network: "Network", process: VirtualProcess) -> None:
        self.process = process
        self.on_message: Callable[[Any], None] = _ignore
        self.on_lost: Callable[[str], None] = _ignore
        self.peer: ConnectionEnd
        self.is_open = True
        self._is_cut = False
        self._num_sent = self._num_received = 0
        self._network = network
        self._last_delivery_s = 0.0
        process.when_it_dies(self.close)

    def send(self, message: object, fd: int | None = None) -> None:
        """Delivers after the latency, behind earlier messages; a closed end drops the message."""
        if not self.is_open:
            return
        number = self._num_sent
        self._num_sent += 1
        match self._network.faults.of_message(message):
            case MessageFault.LOSE:
                return
            case MessageFault.DUPLICATE:
                self._deliver(lambda: self.peer._receive(number, message))
            case MessageFault.OVERTAKE:  # by the message sent after it
                self._network.deliver_late(self, lambda: self.peer._receive(number, message))
                return
            case None:
                pass
        self._deliver(lambda: self.peer._receive(number, message))

    def close(self) -> None:
        """Closes the connection; idempotent. The other side notices after all earlier messages."""
        if self.is_open:
            self.is_open = False
            self._deliver(lambda: self.peer._lose("the peer closed the connection"))

    def cut(self) -> None:
        """Breaks the connection in the network: messages in flight are lost, and one side may notice long
        before the other."""
        for end in (self, self.peer):
            end._is_cut = True
            heard_s = (
                self._network.arrival_s(self.process, self.peer.process) + self._network.faults.half_open_s()
            )
            end.process.call_at(heard_s, end._reset)

    def _deliver(self, call: Callable[[], None]) -> None:
        at_s = max(self._last_delivery_s + 1e-9, self._network.arrival_s(self.process, self.peer.process))
        self._last_delivery_s = at_s
        self.peer.process.call_at(at_s, call)

    def _receive(self, number: int, message: object) -> None:
        if not self.is_open or self._is_cut:
            return
        if number != self._num_received:  # as `core.codec.FrameDecoder` does
            self.close()
            self.on_lost(f"frame {number} came, {self._num_received} was due")
            return
        self._num_received += 1
        self.on_message(message)

    def _reset(self) -> None:
        self._lose("connection reset")

    def _lose(self, error: str) -> None:
        if self.is_open:
            self.is_open = False
            self.on_lost(error)


class Network:
    """The reachability and latency between processes."""

    def __init__(self, time: VirtualTime, faults: "Faults") -> None:
        self.faults = faults
        self._time = time
        self._ends: list[ConnectionEnd] = []
        self._healed_s: dict[frozenset[str], float] = {}  # pair of processes -> end of their partition

    def connect(self, a: VirtualProcess, b: VirtualProcess) -> tuple[ConnectionEnd, ConnectionEnd]:
        ends = ConnectionEnd(self, a), ConnectionEnd(self, b)
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        self._ends += ends
        return ends

    def lose_last_words(self, process: VirtualProcess) -> None:
        """Drops, for each peer of a dying process, all or none of the messages that it sent last."""
        for end in self._ends:
            if end.process is process and end.is_open and self.faults.are_last_words_lost():
                end.peer._is_cut = True

    def cut(self, process: VirtualProcess, spared: VirtualProcess | None = None) -> None:
        """Breaks every connection of a process, except those to `spared`."""
        self._ends = [end for end in self._ends if end.is_open]
        for end in self._ends:
            if end.process is process and end.peer.process is not spared:
                end.cut()

    def arrival_s(self, a: VirtualProcess, b: VirtualProcess) -> float:
        """Returns when a message sent now arrives; during a partition it is resent afterwards."""
        start_s = max(self._time.now_s, self._healed_s.get(frozenset((a.name, b.name)), 0.0))
        return start_s + self.faults.latency_s()

    def partition(self, a: str, b: str, duration_s: float) -> None:
        self._healed_s[frozenset((a, b))] = self._time.now_s + duration_s

    def deliver_late(self, end: ConnectionEnd, call: Callable[[], None]) -> None:
        end.peer.process.call_at(
            self.arrival_s(end.process, end.peer.process) + 10 * self.faults.latency_s(), call
        )
