"""One worker in virtual time: production's `Worker`, block pool and transfer hub; threads, sockets and model
are simulated.

router's connection --commands--> inbox --> engine: Worker.step() --> messages --> router's connection
transfer hub --endings--> inbox; engine --calls--> hub, a moment later, in their order
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from ..core.failures import FailureKind
from ..core.messages import (
    HEARTBEAT_S,
    Abort,
    Heartbeat,
    Probe,
    Probed,
    Role,
    StepReport,
    TransferAddress,
    TransferStats,
    WorkerCommand,
    WorkerInfo,
)
from ..core.needs import Need
from ..core.request import TransferId
from ..engine.batch import RoleEngine
from ..engine.block_pool import BlockPool
from ..engine.kv_manager import KVManager
from ..engine.sequence import Sequence
from ..kv_transfer.config import TransferConfig
from ..kv_transfer.outbound import Dialling, OutboundPair
from ..router.cores import Placement
from ..worker.ending import Part, in_closing_order
from ..worker.router_session import RECONNECT_S, RouterSession, RouterSilence
from ..worker.step_watch import StepWatch, WatchedRunner
from ..worker.worker import Worker
from .chain_runner import ChainRunner
from .faults import Faults
from .kv_model import NUM_LAYERS
from .network import ConnectionEnd
from .simulated_masks import NO_TOKEN_IS_RULED_OUT, SimulatedMasks
from .simulated_port import HOP_S
from .simulated_ranks import Instance, SimulatedRank, SimulatedRanks
from .virtual_time import VirtualProcess, VirtualTime

NEED = Need(1, 1.0, num_bytes=1)  # per instance
# patience with a step: less than production's, as these steps are shorter
FIRST_STEP_S, LEAST_STEP_S = 4.0, 2.0
FRAME_TOKENS = 64  # so few that a worker's held legs often take more than one frame
CLOSING_S = {Part.TRANSFERS: 3.0}  # to end threads that wait for peers
REPORTED_AT_ONCE = 4  # so few cached blocks that all of them often take more than one report


@dataclass(frozen=True)
class WorkerShape:
    """A worker's limits."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_batch_tokens: int
    max_batch_size: int
    step_s: float
    token_s: float = 0.0001
    runs_ahead: bool = False  # as a GPU does: a step is launched before the one before it is collected
    num_ranks: int = 1
    num_kv_heads: int = 1  # of the model, the same for all


@dataclass
class StepClock:
    """The engine thread's clock: runs ahead of the events while a step computes."""

    time: VirtualTime
    shape: WorkerShape
    ahead_s: float = 0.0
    factor: float = 1.0  # of a slow worker

    def __call__(self) -> float:
        return self.time.now_s + self.ahead_s

    def spend(self, seconds: float) -> None:
        self.ahead_s += seconds

    def of(self, num_tokens: int) -> float:
        return (self.shape.step_s + num_tokens * self.shape.token_s) * self.factor


@dataclass
class EngineInbox:
    """Carries a transfer's ending from the transfer thread to the engine."""

    worker: "SimulatedWorker"

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self.worker.post(lambda: self.worker.worker.received(transfer, payload))

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self.worker.post(lambda: self.worker.worker.receive_failed(transfer, error, kind))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self.worker.post(lambda: self.worker.worker.sent(transfer, stats))

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self.worker.post(lambda: self.worker.worker.send_failed(transfer, error, kind))


class WorkerWorld(Protocol):
    """The surroundings of a simulated worker."""

    time: VirtualTime
    rng: Random
    faults: Faults

    def fails_store(self, worker_id: str) -> bool:
        """Whether a worker fails to read or write a block."""
        ...

    def dial(self, source: SimulatedRank, pair: OutboundPair, epoch: int) -> Dialling:
        """Connects a rank of a worker to one of another worker."""
        ...

    def connect(self, worker: "SimulatedWorker") -> ConnectionEnd | None:
        """Connects a worker to the router; None while there is no router."""
        ...

    def reach(self, source: "SimulatedWorker", target: TransferAddress) -> tuple[float, str]:
        """Returns how long it takes to determine whether another worker is reachable, and why it is not."""
        ...

    def violation(self, text: str) -> None: ...
    def on_sample(self, worker: "SimulatedWorker", seq: Sequence, choice: int, index: int) -> None: ...


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One incarnation of a worker."""

    role: Role
    worker_id: str
    incarnation: int
    need: Need = NEED

    @property
    def key(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.incarnation}"


class SimulatedWorker:
    """A worker, alive as long as its process."""

    def __init__(
        self,
        world: WorkerWorld,
        spec: InstanceSpec,
        placement: Placement,
        shape: WorkerShape,
        transport: str,
        config: TransferConfig,
    ) -> None:
        time = world.time
        self.process = process = VirtualProcess(time, str(spec))
        self.spec = spec
        self.placement = placement
        self.shape = shape
        self.clock = StepClock(time, shape)
        self.pool = BlockPool(shape.num_blocks, shape.block_size, REPORTED_AT_ONCE)
        instance = Instance(
            *spec.key,
            placement.node_id,
            transport,
            shape.num_ranks,
            shape.num_kv_heads,
            self.pool,
            config,
        )
        self.transfers = SimulatedRanks(world, instance, process, self.clock, EngineInbox(self), self._fail)
        self.ranks = self.transfers.ranks
        self.watch = StepWatch(FIRST_STEP_S, LEAST_STEP_S)
        self.hangs = False  # its next step never ends
        engine = RoleEngine(
            KVManager(self.pool, shape.max_model_len),
            WatchedRunner(
                ChainRunner(
                    [rank.store for rank in self.ranks],
                    self.pool,
                    self.clock,
                    self._on_sample,
                    shape.runs_ahead,
                ),
                self.watch,
            ),
            NUM_LAYERS,
            shape.max_batch_tokens,
            shape.max_batch_size,
        )
        self.worker = Worker(
            *spec.key,
            engine,
            self.transfers.port,
            SimulatedMasks(process, Random(f"{process.name} {time.now_s}"), self.clock, self._on_mask),
            lambda sequences: None,  # so every mask is late
            self.clock,
        )
        self.has_ended_in_order = False
        self._has_crashed = False
        self._time = time
        self._world = world
        self._session = RouterSession(*spec.key, time.now_s, FRAME_TOKENS)
        self._silence = RouterSilence(time.now_s)
        self._connection: ConnectionEnd | None = None  # to the router
        self._router: ConnectionEnd | None = None  # the same connection, once greeted
        self._inbox: deque[Callable[[], None]] = deque()
        self._is_awake = False
        self._aborted: set[tuple[TransferId, int | None]] = set()  # of one choice, or of all
        self._over: set[tuple[TransferId, int]] = set()  # choices whose last token was reported

    def start(self, load_s: float) -> None:
        """Starts the process, whose weights are loaded after `load_s`."""
        self._loads_s = self._time.now_s, load_s
        self.process.every(HEARTBEAT_S, self._beat)
        self._dial()
        self.process.call_later(load_s, self._serve)

    def _loaded_part(self) -> float:
        begin_s, load_s = self._loads_s
        return min((self._time.now_s - begin_s) / load_s, 1.0)

    def end(self) -> None:
        """Ends the process in order, unless it is about to end by itself."""
        if not self._has_crashed:
            self.has_ended_in_order = True
            self.process.kill()

    def crash(self) -> None:
        """Lets the engine fail: the process closes its parts, one after the other, and ends."""
        self._has_crashed = True
        failing = self._session.failing("the engine failed")
        if failing is not None and self._connection is not None:
            self._connection.send(failing)
        after_s = 0.0
        for part, close in in_closing_order({Part.ROUTER_LINK: self._hang_up, Part.TRANSFERS: lambda: None}):
            self.process.call_later(after_s, close)
            after_s += CLOSING_S.get(part, 0.0)
        self.process.call_later(after_s, self.process.kill)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._router = None

    def _serve(self) -> None:
        """Begins to serve, once the worker is loaded."""
        for rank in self.ranks:
            rank.start()
        self._session.loaded()
        if self._connection is not None:
            self._greet_soon(self._connection)

    # the router

    def _dial(self) -> None:
        """Connects repeatedly; without a router the worker continues for a while, then ends."""
        now_s = self._time.now_s
        if self._has_crashed:
            return
        if not self._session.may_dial(now_s):
            self.end()
            return
        connection = self._world.connect(self)
        if connection is None:
            self.process.call_later(RECONNECT_S, self._dial)
            return
        self._session.connected(now_s)
        self._silence, self._connection = RouterSilence(now_s), connection
        connection.on_message = self._on_command
        connection.on_lost = lambda _: self._on_lost()
        connection.send(self._session.hello)
        if self._session.is_loaded:
            self._greet_soon(connection)
        else:
            connection.send(self._session.catch_up() or self._session.progress("loading weights", 0.0))

    def _beat(self) -> None:
        if self._connection is None:
            return
        if (why := self.watch.beat()) is not None:
            self._fail(why)
        elif self._silence.is_lost(self._time.now_s):
            self._connection.close()
            self._on_lost()
        elif self._router is not None:
            self._router.send(self.worker.report())
        elif not self._session.is_loaded:
            self._connection.send(self._session.progress("loading weights", self._loaded_part()))

    def _fail(self, why: str) -> None:
        """Ends the process at once, whatever its threads hang in."""
        failing = self._session.failing(why)
        if failing is not None and self._connection is not None:
            self._connection.send(failing)
        self.process.kill()

    def _greet_soon(self, connection: ConnectionEnd) -> None:
        """Greets the router from the engine's thread."""
        self.post(lambda: self._greet(connection))

    def _greet(self, connection: ConnectionEnd) -> None:
        if not connection.is_open:
            return
        greeting = self._session.greeting(
            connection, self.info(), self.worker.held_legs(), self.worker.num_cached_blocks
        )
        if greeting:
            self.worker.greeted()
        for message in greeting:
            connection.send(message)
        self._router = connection

    def _on_lost(self) -> None:
        self._connection = self._router = None
        self._session.lost(self._time.now_s)
        self.process.call_later(RECONNECT_S, self._dial)

    def _on_command(self, command: WorkerCommand) -> None:
        self._silence.heard(self._time.now_s)
        if isinstance(command, Probe):
            after_s, error = self._world.reach(self, command.target)
            self.process.call_later(after_s, lambda: self._answer(command, error))
        elif not isinstance(command, Heartbeat):
            self.post(lambda: self._handle(command))

    def _answer(self, probe: Probe, error: str) -> None:
        target = probe.target
        if self._router is not None:
            self._router.send(
                Probed(
                    worker_id=self.spec.worker_id,
                    incarnation=self.spec.incarnation,
                    target_worker_id=target.worker_id,
                    target_incarnation=target.incarnation,
                    error=error,
                )
            )

    def _handle(self, command: WorkerCommand) -> None:
        self.worker.handle(command)
        if isinstance(command, Abort):
            self._aborted.add((command.transfer, command.choice))

    def _on_mask(self, key: int, num_tokens: int) -> None:
        self.post(lambda: self.worker.masked(key, num_tokens, NO_TOKEN_IS_RULED_OUT))

    def _on_sample(self, seq: Sequence, choice: int, index: int) -> None:
        if not self._aborted.isdisjoint(((seq.transfer, None), (seq.transfer, choice))):
            self._world.violation(f"{self.process.name}: computes {seq.transfer}/{choice} after its abort")
        self._world.on_sample(self, seq, choice, index)

    def info(self) -> WorkerInfo:
        shape = self.shape
        return WorkerInfo(
            worker_id=self.spec.worker_id,
            incarnation=self.spec.incarnation,
            role=self.spec.role,
            layout=self.ranks[0].local.layout,
            num_blocks=shape.num_blocks,
            max_model_len=shape.max_model_len,
            max_batch_tokens=shape.max_batch_tokens,
            max_batch_size=shape.max_batch_size,
            address=self.transfers.address(),
            devices=(),
            node="here",
            pid=0,
            kernels="chain",
        )

    def post(self, event: Callable[[], None]) -> None:
        """Lets the engine thread handle `event` before its next step."""
        self._inbox.append(event)
        if not self._is_awake:
            self._is_awake = True
            self.process.call_later(HOP_S, self._turn)

    def _turn(self) -> None:
        """Runs one turn of the engine's loop; the step's messages are sent when it is over."""
        if self._has_crashed:
            return
        self.watch.begin(self._time.now_s)
        while self._inbox:
            self._inbox.popleft()()
        self.clock.ahead_s = 0.0
        worked = self.worker.step()
        ahead_s, self.clock.ahead_s = self.clock.ahead_s, 0.0
        if not self.hangs:
            self.transfers.siblings.compute(ahead_s, lambda: self._end_turn(worked))

    def _end_turn(self, worked: bool) -> None:
        if self._has_crashed:
            return
        self.watch.end(self._time.now_s)
        for message in self.worker.take_messages():
            if isinstance(message, StepReport):
                self._check_report(message)
            if self._router is not None:
                self._router.send(message)
        if worked or self._inbox or self.worker.has_more_to_report:
            self._turn()
        else:
            self._is_awake = False

    def _check_report(self, report: StepReport) -> None:
        for output in report.outputs:
            choice = output.transfer, output.choice
            if choice in self._over:
                self._world.violation(
                    f"{self.process.name}: reports token {output.index} of {choice}, which has ended"
                )
            if output.finish_reason is not None:
                self._over.add(choice)

    @property
    def is_idle(self) -> bool:
        return not self._is_awake and not self._inbox and not self.worker.num_legs
