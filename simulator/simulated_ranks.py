"""The ranks of one simulated instance, each with a process, a store and a transfer hub, joined as in
production.

Rank 0's process is the worker's. Its commands reach the others in order, behind the step that caused them;
what they report may come late, and twice."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

from ..core.failures import FailureKind
from ..core.messages import TransferAddress
from ..core.request import TransferId
from ..engine.block_pool import BlockPool
from ..kv_transfer.choice import Place
from ..kv_transfer.config import TransferConfig
from ..kv_transfer.hub import TransferHub
from ..kv_transfer.interfaces import TransferListener, TransferPort
from ..kv_transfer.outbound import Dialling, OutboundPair
from ..kv_transfer.pair import Identity, Local
from ..kv_transfer.parts import Share
from ..kv_transfer.ranks import InstancePort, RankPort
from .kv_model import ChainStore
from .rank_siblings import Siblings
from .simulated_port import HOP_S, Port
from .virtual_time import VirtualProcess, VirtualTime

DELAYED_S = 0.2  # now and then, between a rank and rank 0


class RankWorld(Protocol):
    """The surroundings of a rank."""

    rng: Random

    def fails_store(self, worker_id: str) -> bool: ...
    def dial(self, source: "SimulatedRank", pair: OutboundPair, epoch: int) -> Dialling: ...
    def violation(self, text: str) -> None: ...


class EngineClock(Protocol):
    """The engine's clock, which runs ahead of the events while a step computes."""

    time: VirtualTime

    def __call__(self) -> float: ...


@dataclass(frozen=True)
class Instance:
    """The values that the ranks of an instance share. Frozen: each incarnation has its own."""

    worker_id: str
    incarnation: int
    node_id: str
    transport: str
    num_ranks: int
    num_kv_heads: int
    pool: BlockPool
    config: TransferConfig

    @property
    def key(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation


class SimulatedRank:
    """One rank's end of transfers."""

    def __init__(
        self,
        world: RankWorld,
        instance: Instance,
        rank: int,
        process: VirtualProcess,
        clock: EngineClock,
        listener: TransferListener,
    ) -> None:
        share = Share(rank, instance.num_ranks, instance.num_kv_heads)
        self.worker_id = instance.worker_id
        self.transport = instance.transport
        self.process = process
        self.store = ChainStore(
            instance.pool,
            clock,
            lambda text: world.violation(f"{process.name}: {text}"),
            partial(world.fails_store, instance.worker_id),
            share.heads,
        )
        self.local = Local(
            Identity(*instance.key, Place(instance.node_id, "")),
            self.store,
            EndOfLease(self.store, listener),
            instance.config,
            clock=lambda: clock.time.now_s,
            wait=lambda link, ticket, timeout_s, done: ticket.when_done(process, timeout_s, done),
            rank_share=share,
        )
        self.hub = TransferHub(self.local, partial(world.dial, self))

    def start(self) -> None:
        """Begins to serve."""
        self.process.every(self.local.config.heartbeat_s / 2, self.hub.tick)


class EndOfLease:
    """A rank's listener: a part that has ended must not write any more."""

    def __init__(self, store: ChainStore, listener: TransferListener) -> None:
        self._leases = store.leases
        self.on_sent, self.on_send_failed = listener.on_sent, listener.on_send_failed
        self._listener = listener

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._leases.pop(transfer, None)
        self._listener.on_received(transfer, payload)

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._leases.pop(transfer, None)
        self._listener.on_receive_failed(transfer, error, kind)


class SimulatedRanks:
    """All ranks of an instance, and the port by which its worker uses them."""

    def __init__(
        self,
        world: RankWorld,
        instance: Instance,
        process: VirtualProcess,
        clock: EngineClock,
        listener: TransferListener,
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_lost` is called in rank 0's process with the reason why the instance is over."""
        self._world, self._instance, self._clock = world, instance, clock
        self._own_rng = Random(f"ranks of {process.name} {clock.time.now_s}")
        self.ranks: list[SimulatedRank] = []
        self._ports: dict[int, RankPort[Port]] = {}
        self._last_s = [0.0] * instance.num_ranks
        self._joined: InstancePort[Port] | None = None
        self.port: TransferPort
        if instance.num_ranks == 1:
            self.port = self._make(0, process, clock, listener)
            self.siblings = Siblings(clock.time, process, [], on_lost, world.violation)
            return
        make = partial(self._make, 0, process, clock)
        share = Share(0, instance.num_ranks, instance.num_kv_heads)
        self.port = self._joined = InstancePort(make, listener, share, self._command)
        for rank in range(1, instance.num_ranks):
            other = VirtualProcess(clock.time, f"{process.name}.{rank}")
            make = partial(self._make, rank, other, lambda: clock.time.now_s)
            self._ports[rank] = RankPort(make, partial(self._report, rank))
        others = [rank.process for rank in self.ranks[1:]]
        self.siblings = Siblings(clock.time, process, others, on_lost, world.violation)

    @property
    def num_open(self) -> int:
        """The number of transfers whose end is yet to come at rank 0."""
        return 0 if self._joined is None else self._joined.num_open

    def address(self, rank: int = 0) -> TransferAddress:
        instance = self._instance
        others = () if rank else tuple(map(self.address, range(1, instance.num_ranks)))
        return TransferAddress(
            *instance.key,
            instance.node_id,
            "",
            "",
            0,
            rank=rank,
            num_ranks=instance.num_ranks,
            others=others,
        )

    def _make(
        self, rank: int, process: VirtualProcess, clock: Callable[[], float], listener: TransferListener
    ) -> Port:
        made = SimulatedRank(self._world, self._instance, rank, process, self._clock, listener)
        self.ranks.append(made)
        return Port(process, clock, made.hub, made.store, self._world.rng)

    def _command(self, rank: int, data: bytes) -> None:
        """Carries a command to a rank, behind the step that is computed."""
        self._last_s[rank] = max(self._last_s[rank] + 1e-9, self._clock() + self._delay_s())
        port = self._ports[rank]
        self.ranks[rank].process.call_at(self._last_s[rank], lambda: port.on_command(data))

    def _report(self, rank: int, data: bytes) -> None:
        joined, at_s = self._joined, self._clock.time.now_s + self._delay_s()
        assert joined is not None
        for _ in range(2 if self._own_rng.random() < 0.05 else 1):
            self.ranks[0].process.call_at(at_s, lambda: joined.on_end(rank, data))
            at_s += self._delay_s()

    def _delay_s(self) -> float:
        return (DELAYED_S if self._own_rng.random() < 0.02 else HOP_S) * self._own_rng.random()
