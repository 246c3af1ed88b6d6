"""One instance of a virtual cluster: production's `Worker` over a model that takes predicted time and
computes nothing."""

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from ..core.messages import (
    KVLayout,
    LegEnded,
    Role,
    StepReport,
    StepTiming,
    TransferAddress,
    TransferStats,
    WorkerCommand,
    WorkerInfo,
)
from ..core.request import TransferId
from ..engine.batch import Batch, CompletedStep, RoleEngine, SampledToken
from ..engine.block_pool import BlockPool
from ..engine.kv_manager import KVManager
from ..engine.token_masks import NoGrammars
from ..worker.worker import Worker
from .durations import Durations

INCARNATION = 1
_TOKEN = SampledToken(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceShape:
    """An instance's role, limits and speed."""

    role: Role
    durations: Durations
    num_blocks: int
    max_model_len: int
    max_batch_tokens: int
    max_batch_size: int


class World(Protocol):
    """The surroundings of an instance: time, the router, and KV on its way."""

    now_s: float
    is_preloading: bool

    def call_at(self, at_s: float, call: Callable[[], object]) -> None: ...
    def report(self, message: StepReport | LegEnded) -> None: ...
    def granted(self, transfer: TransferId, target: "VirtualInstance", num_cached_tokens: int) -> None: ...
    def opened(self, transfer: TransferId, source: "VirtualInstance") -> None: ...
    def computed(self, transfer: TransferId, num_tokens: int) -> None: ...
    def committed(self, transfer: TransferId, payload: bytes) -> None: ...


class VirtualInstance:
    """A loop of steps: what arrives during a step is handled behind it."""

    def __init__(self, world: World, name: str, shape: InstanceShape, layout: KVLayout) -> None:
        self.name = name
        self.shape = shape
        self.busy_s = 0.0
        self.min_free_blocks = shape.num_blocks
        self._world = world
        self._layout = layout
        self._ahead_s = 0.0  # its clock is ahead of the events while a step computes
        self._pool = BlockPool(shape.num_blocks, layout.block_size)
        engine = RoleEngine(
            KVManager(self._pool, shape.max_model_len),
            _Runner(self),
            1,  # layer: the KV of a step leaves while it is under way
            shape.max_batch_tokens,
            shape.max_batch_size,
        )
        self._worker = Worker(
            name, INCARNATION, engine, _Port(world, self), NoGrammars(), lambda _: None, self.clock_s
        )
        self._inbox: list[Callable[[], object]] = []
        self._is_awake = False

    @property
    def info(self) -> WorkerInfo:
        shape = self.shape
        return WorkerInfo(
            worker_id=self.name,
            incarnation=INCARNATION,
            role=shape.role,
            layout=self._layout,
            num_blocks=shape.num_blocks,
            max_model_len=shape.max_model_len,
            max_batch_tokens=shape.max_batch_tokens,
            max_batch_size=shape.max_batch_size,
            address=TransferAddress(self.name, INCARNATION, "", "", "", 0),
            devices=(),
            node="",
            pid=0,
            kernels="",
        )

    @property
    def num_preemptions(self) -> int:
        return self._worker.load.num_preemptions

    def check_idle(self) -> None:
        """Raises AssertionError when a leg is open or a block is held."""
        self._pool.check_integrity()
        assert not self._worker.num_legs and self._pool.num_free_blocks == self.shape.num_blocks

    def clock_s(self) -> float:
        return self._world.now_s + self._ahead_s

    def spend_step(self, timing: StepTiming) -> None:
        """The prompts of what it decodes from the start cost no time."""
        if not (self._world.is_preloading and timing.num_prefill_tokens):
            self._ahead_s += self.shape.durations.step_s(timing)

    def command(self, command: WorkerCommand) -> None:
        self._post(lambda: self._worker.handle(command))

    def received(self, transfer: TransferId, payload: bytes) -> None:
        self._post(lambda: self._worker.received(transfer, payload))

    def sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._post(lambda: self._worker.sent(transfer, stats))

    def _post(self, event: Callable[[], object]) -> None:
        self._inbox.append(event)
        if not self._is_awake:
            self._is_awake = True
            self._world.call_at(self._world.now_s, self._turn)

    def _turn(self) -> None:
        inbox, self._inbox = self._inbox, []
        for event in inbox:
            event()
        self._ahead_s = 0.0
        has_worked = self._worker.step()
        step_s, self._ahead_s = self._ahead_s, 0.0
        self.busy_s += step_s
        self._world.call_at(self._world.now_s + step_s, lambda: self._end_turn(has_worked))

    def _end_turn(self, has_worked: bool) -> None:
        for message in self._worker.take_messages():
            self._world.report(message)
        self.min_free_blocks = min(self.min_free_blocks, self._worker.load.num_free_blocks)
        if has_worked or self._inbox or self._worker.has_more_to_report:
            self._turn()
        else:
            self._is_awake = False


class _Runner:
    """Implements `engine.batch.StepRunner`: each token is the same."""

    runs_ahead = False

    def __init__(self, instance: VirtualInstance) -> None:
        self._instance = instance

    def launch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        before_sampling: Callable[[], None] | None = None,
    ) -> CompletedStep:
        if on_layer is not None:
            on_layer(0)  # KV leaves while the step computes
        self._instance.spend_step(batch.timing(0.0))
        return CompletedStep([[_TOKEN] * len(chunk.choices) for chunk in batch.chunks])


class _Port:
    """Implements `worker.worker.TransferPort`."""

    def __init__(self, world: World, instance: VirtualInstance) -> None:
        self._world, self._instance = world, instance

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Seq[int],
        num_tokens: int,
        num_cached_tokens: int,
        num_source_ranks: int,
    ) -> None:
        self._world.granted(transfer, self._instance, num_cached_tokens)

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Seq[int], num_tokens: int
    ) -> None:
        self._world.opened(transfer, self._instance)

    def extend(self, transfer: TransferId, block_ids: Seq[int]) -> None:
        pass

    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None:
        self._world.computed(transfer, token_end)

    def prefill_done(self, transfer: TransferId) -> None:
        pass

    def commit(self, transfer: TransferId, payload: bytes) -> None:
        self._world.call_at(self._instance.clock_s(), lambda: self._world.committed(transfer, payload))

    def cancel(self, transfer: TransferId) -> None:
        raise AssertionError(f"{transfer} is cancelled, though nothing fails and no client gives up")
