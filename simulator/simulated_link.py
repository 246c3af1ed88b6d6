"""The link between two workers: a connection for the control stream, and a staging ring that both see."""

from collections.abc import Callable
from typing import Any, ClassVar

from ..kv_transfer.connecting import Connecting, ConnectState
from ..kv_transfer.inbound import InboundPair
from ..kv_transfer.link import LinkError, PeerLost, TransferTimeout
from ..kv_transfer.outbound import OutboundPair
from ..kv_transfer.protocol import Connect, LinkRefused, Prepare
from .network import ConnectionEnd, Network
from .scenario import Severed
from .simulated_ranks import SimulatedRank
from .virtual_time import Timer, VirtualProcess

PREPARE_S = 0.001  # to create a ring


class SharedRing:
    """Implements `kv_transfer.link.Link` for both sides, as shared memory does."""

    name: ClassVar = "shm"
    executor = None
    takes_turns = False
    is_gone = True  # nothing of it needs to be waited for

    def __init__(self, num_slots: int, slot_bytes: int, corrupts: Callable[[], bool]) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = bytearray(num_slots * slot_bytes)
        self._corrupts = corrupts

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return memoryview(self._memory)[start : start + num_bytes]

    def send(self, slot: int, num_bytes: int, seq: int) -> "Ticket | None":
        if self._corrupts():
            self._memory[slot * self.slot_bytes + num_bytes // 2] ^= 0x10
        return None

    def recv(self, slot: int, num_bytes: int, seq: int) -> "Ticket | None":
        return None

    def wait(self, ticket: Any, timeout_s: float) -> None:
        raise AssertionError("virtual time does not block")

    def kill(self) -> None: ...

    def join(self) -> None: ...


class Ticket:
    """An operation of a copying link."""

    def __init__(self) -> None:
        self.is_done = False
        self.error: LinkError | None = None
        self._done: Callable[[BaseException | None], None] | None = None

    def resolve(self, error: LinkError | None = None) -> None:
        if self.is_done:
            return
        self.is_done, self.error = True, error
        if self._done is not None:
            self._done(error)

    def when_done(
        self, process: VirtualProcess, timeout_s: float, done: Callable[[BaseException | None], None]
    ) -> None:
        """Implements `kv_transfer.pair.Wait` in virtual time."""
        self._done = done
        if self.is_done:
            process.call_later(0.0, lambda: done(self.error))
        else:
            process.call_later(
                timeout_s, lambda: self.resolve(TransferTimeout(f"nothing within {timeout_s} s"))
            )


class CopyingRing(SharedRing):
    """One side's ring of a link that copies, as gloo does: bytes travel separately from the stream that
    announces them."""

    name = "gloo"

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        network: Network,
        process: VirtualProcess,
        corrupts: Callable[[], bool],
    ) -> None:
        super().__init__(num_slots, slot_bytes, corrupts)
        self._faults = network.faults
        self.peer: CopyingRing = self
        self._network = network
        self._process = process
        self._arrived: dict[int, bytes] = {}
        self._expected: dict[int, tuple[int, Ticket]] = {}
        self._is_dead = False

    def send(self, slot: int, num_bytes: int, seq: int) -> Ticket:
        if self._faults.breaks_link():
            raise PeerLost("the connection broke")
        super().send(slot, num_bytes, seq)
        data, ticket = bytes(self.slot(slot, num_bytes)), Ticket()
        if not self._faults.loses_chunk():
            at_s = self._network.arrival_s(self._process, self.peer._process)
            self.peer._process.call_at(at_s, lambda: self.peer._arrive(seq, data))
            self._process.call_at(at_s, ticket.resolve)
        return ticket

    def recv(self, slot: int, num_bytes: int, seq: int) -> Ticket:
        if self._faults.breaks_link():
            raise PeerLost("the connection broke")
        ticket = Ticket()
        self._expected[seq] = slot, ticket
        self._match(seq)
        return ticket

    def kill(self) -> None:
        """Kills the link as gloo does: a waiting side notices when its timeout expires."""
        self._is_dead = True

    def _arrive(self, seq: int, data: bytes) -> None:
        if not self._is_dead:
            self._arrived[seq] = data
            self._match(seq)

    def _match(self, seq: int) -> None:
        if seq in self._arrived and seq in self._expected:
            (slot, ticket), data = self._expected.pop(seq), self._arrived.pop(seq)
            self.slot(slot, len(data))[:] = data
            ticket.resolve()


class SimulatedDial:
    """One attempt to connect, in virtual time: the shells around `Connecting` and the two pairs, as
    `TransferDialler` and `TransferAcceptor` are in production."""

    def __init__(
        self,
        network: Network,
        source: SimulatedRank,
        target: SimulatedRank | None,
        pair: OutboundPair,
        epoch: int,
        corrupts: Callable[[], bool],
        severed: Severed | None,
    ) -> None:
        self._network, self._source, self._target = network, source, target
        self._corrupts = corrupts
        self._pair, self._epoch = pair, epoch
        self._connecting = Connecting(source.transport, source.local.config)
        self._ring: SharedRing | None = None
        self._is_over = False
        self._timer: Timer | None = None
        self._end: ConnectionEnd | None = None
        if severed is not None and severed.is_silent:
            self._limit(self._connecting.timeout_s)
            return
        if target is None or not target.process.is_alive or severed is not None:
            source.process.call_later(network.faults.latency_s(), lambda: self._fail("connection refused"))
            return
        self._end, theirs = network.connect(source.process, target.process)
        self._end.on_message = self._on_answer
        self._end.on_lost = lambda error: self._on_answer(LinkError(error))
        theirs.on_message = lambda message: self._on_greeting(theirs, message)
        self._limit(self._connecting.timeout_s)
        self._end.send(pair.greeting(source.transport, epoch))

    def cancel(self) -> None:
        self._finish()
        if self._end is not None:
            self._end.close()

    # on the target

    def _on_greeting(self, end: ConnectionEnd, message: Any) -> None:
        assert self._target is not None
        if not isinstance(message, Connect):
            return
        pair = self._target.hub.admit(message)
        if isinstance(pair, str):
            end.send(LinkRefused(pair))
            end.close()
            return
        pair.num_preparing += 1
        self._target.process.call_later(PREPARE_S, lambda: self._prepare(end, pair, message))

    def _prepare(self, end: ConnectionEnd, pair: InboundPair, connect: Connect) -> None:
        assert self._target is not None
        pair.num_preparing -= 1
        config = self._target.local.config
        num_slots, slot_bytes = config.ring_slots, config.chunk_bytes_of("shm")
        ring: SharedRing
        if connect.link == "shm":
            ring = self._ring = SharedRing(num_slots, slot_bytes, self._corrupts)
        else:
            shape = num_slots, slot_bytes, self._network
            ring = theirs = CopyingRing(*shape, self._target.process, self._corrupts)
            self._ring = ours = CopyingRing(*shape, self._source.process, self._corrupts)
            ours.peer, theirs.peer = theirs, ours
            ours.takes_turns = connect.epoch % 2 == 0  # as NCCL's do; gloo's do not
        end.send(Prepare(connect.epoch, num_slots, slot_bytes))
        if not pair.attach(end, ring, connect.epoch):
            end.close()

    # on the source

    def _on_answer(self, answer: Any) -> None:
        if self._is_over:
            return
        try:
            if self._connecting.state is ConnectState.GREETED:
                self._connecting.prepared(answer)
                if self._connecting.build_timeout_s is not None:
                    self._limit(self._connecting.build_timeout_s)
                return
            self._connecting.built(answer)
        except LinkError as error:
            self._fail(str(error))
            return
        assert self._ring is not None and self._end is not None
        self._finish()
        self._pair.connected(self._end, self._ring, self._epoch, ())

    def _fail(self, error: str) -> None:
        if self._is_over:
            return
        self.cancel()
        self._pair.not_connected(error)

    def _limit(self, timeout_s: float) -> None:
        """Ends the attempt if it takes longer than this from now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._source.process.call_later(timeout_s, lambda: self._fail(self._connecting.expired))

    def _finish(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
