"""The head: gateway, router and controller in one process, on one asyncio loop. To the gateway it is the
`Frontend`."""

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from .. import __version__
from ..core.config import ClusterConfig
from ..core.devices import DeviceKind
from ..core.errors import CapacityError, InvalidRequest
from ..core.latency import LatencyModel
from ..core.messages import KVLayout, Role
from ..core.request import Request
from ..core.status import ClusterStatus
from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..gateway.app import GatewayServer, open_gateway
from ..planner.device_choice import resolve_device, why_device
from ..planner.plan import plan, planned_layout
from ..planner.priors import priors, rates_of
from ..router.config import RouterConfig
from ..router.core import Router
from ..router.events import Closing, EmitChoiceEnd, EmitEnd, EmitTokens, Tick, Timeline
from ..router.fleet import Fleet, FleetConfig
from ..router.fleet_events import Apply, Drain, HostJoined, ReplaceWorkers, Shutdown, StartWorker
from ..router.fleet_member import MemberState
from ..router.hosts import Hosts
from ..router.places import Places
from ..router.planner_desk import PlannerState
from ..router.service import RouterService
from ..router.supervisor import GENERATION_STRIDE
from ..telemetry.exposition import Snapshot
from ..worker.spec import WorkerSpec
from .cluster_status import cluster_status
from .controller import Controller
from .host_watch import HostWatch
from .planning import Planning
from .ports import FindNodes, Keeper
from .settings import planner_terms, pool_sizes, pools_are_alike, step_costs, vacated
from .spec import Endpoints, HeadSpec
from .status_feed import StatusFeed
from .telemetry import HeadTelemetry

log = logging.getLogger(__name__)

FIRST_CHECK_S = 5.0  # for hosts that are present at the start; those that answer later join later


class Head:
    """The head's components, running from `start` to `stop`; also the `Frontend` that the gateway calls."""

    def __init__(self, spec: HeadSpec, keeper: Keeper, find_nodes: FindNodes, host: str) -> None:
        """`host` is the address at which workers reach the router."""
        self._spec = spec
        self._keeper = keeper
        self._find_nodes = find_nodes
        self._host = host
        self._config: ClusterConfig  # in force
        self._device: DeviceKind  # of its instances; fixed while the cluster runs
        self._num_applied = 0
        self._gateway: GatewayServer | None = None
        self._is_listening = False
        self._reported_serving = False  # last, to health checks
        self._changed = asyncio.Event()
        self._status_feed = StatusFeed(self.status)
        self._ended = asyncio.Event()

    async def start(self) -> Endpoints:
        """Starts the workers, and opens the gateway while they load; or takes over those of the previous
        head, then opens the gateway.

        Raises CheckpointError, ConfigError or CapacityError.
        """
        spec = self._spec
        config = self._config = await self._keeper.config()
        listener = listen(self._host, spec.endpoints.control_port if spec.endpoints else 0)
        self._control_port = int(listener.getsockname()[1])
        nodes = self._find_nodes(config.model.path, (self._host, self._control_port))
        if spec.endpoints is None:
            asked = await nodes.ask_all(FIRST_CHECK_S)
            self._device = resolve_device(config, asked)
            log.info("device: %s (%s)", self._device, why_device(config, asked))
        else:
            living = await self._keeper.living()
            asked = tuple(vacated(node, living) for node in await nodes.ask_here())
            self._device = spec.endpoints.device
        self._places = Places()
        self._watch = HostWatch(Hosts(self._places), nodes, self._device, is_alone=spec.host is not None)
        if spec.endpoints is None:
            await self._watch.start(config)
            await self._watch.settle(FIRST_CHECK_S)
            asked = self._watch.nodes(config) or asked[:1]
        is_complete = spec.endpoints is None and self._watch.are_complete(config)
        self._plan = plan(config.on(self._device), asked, more_may_come=not is_complete)
        self._plan.check(more_may_come=not is_complete)
        self._started_s = asyncio.get_running_loop().time()
        fleet = Fleet(
            FleetConfig(drain_timeout_s=config.drain_timeout_s, can_flip=pools_are_alike(config)),
            first_incarnation=1 + spec.generation * GENERATION_STRIDE,
        )
        self._controller = Controller(
            fleet,
            self._places,
            self._keeper,
            self._worker_spec,
            self._on_change,
            self._watch.suspect,
            self._watch.refuse,
        )
        shape = open_checkpoint(resolve_model_path(config.model.path)).config
        model = LatencyModel(priors(shape, self._plan, rates_of(self._plan)))
        router = Router(
            RouterConfig.of(config),
            model,
            first_attempt=spec.generation * GENERATION_STRIDE,
            adopts=spec.generation > 0,
        )
        costs = step_costs(config, self._plan)
        self._telemetry = HeadTelemetry(config, costs, model, spec.otlp_endpoint, self._snapshot)
        self._service = RouterService(router, self._controller, spec.token, self._telemetry.recorder)
        self._controller.attach(self._service)
        self._planning = Planning(
            router, model, _PlannedFleet(self), first_number=spec.generation * GENERATION_STRIDE
        )
        self._telemetry.recorder.listener = self._planning.closed
        self._watch.on_vacate = lambda workers: self._controller.handle(ReplaceWorkers(workers))
        self._watch.on_join = self._host_joined
        # waiting instances may have a place now
        self._watch.on_change = lambda: self._controller.handle(Tick())
        await self._service.start(self._host, listener=listener)
        self._is_listening = True
        if spec.endpoints is not None:
            self._controller.adopt(living)
            self._controller.handle(Apply(pool_sizes(config)))
            await self._controller.adopted.wait()
            await self._service.taken_over()
            await self._watch.start(config)  # now that the placement of running workers is known
        else:
            self._controller.handle(Apply(pool_sizes(config)))
        addresses = (
            (spec.endpoints.grpc, spec.endpoints.http)
            if spec.endpoints
            else (config.listen.grpc, config.listen.http)
        )
        self._gateway = await open_gateway(self, config, *addresses, local=spec.local)
        self._configure_planner()
        self._on_change()
        return Endpoints(
            self._gateway.grpc_address, self._gateway.http_address, self._control_port, self._device
        )

    async def wait(self) -> None:
        """Returns when the cluster has been shut down."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Ends everything immediately."""
        self._end()
        if self._gateway is not None:
            await self._gateway.stop(0.0)
        if self._is_listening:
            await self._planning.close()
            await self._watch.close()
            await self._controller.close()
            await self._service.stop()
            await self._telemetry.close()

    # Frontend

    def generate(self, request: Request) -> AsyncGenerator[EmitTokens | EmitChoiceEnd | EmitEnd, None]:
        return self._service.generate(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self._service.cancel(request_id, choice)

    def status(self) -> ClusterStatus:
        now_s = asyncio.get_running_loop().time()
        return cluster_status(
            self._service.router.status(now_s),
            self._controller,
            self._watch.hosts,
            self._places.cores.node_of,
            pool_sizes(self._config),
            self._started_s,
            now_s,
        )

    def metrics(self) -> bytes:
        return self._telemetry.metrics()

    def explain(self, request_id: str) -> Timeline | None:
        now_s = asyncio.get_running_loop().time()
        return self._service.router.timeline(request_id, now_s) or self._telemetry.recent(request_id)

    def latest(self, max_requests: int, scope: str) -> list[Timeline]:
        now_s = asyncio.get_running_loop().time()
        running = self._service.router.timelines(max_requests, scope, now_s)
        return running + self._telemetry.latest(max_requests - len(running), scope)

    def watch(self) -> AsyncGenerator[ClusterStatus, None]:
        return self._status_feed.watch()

    async def apply(self, config: ClusterConfig, dry_run: bool) -> None:
        await self._watch.resolve(config)
        self._check_fits(config)
        if not dry_run:
            self._change_to(config)
            self._configure_planner()

    def _change_to(self, config: ClusterConfig) -> None:
        """Puts a configuration into force, which fits."""
        self._config = config
        self._num_applied += 1  # calls of the keeper may overtake each other
        self._keeper.remember(config, (self._spec.generation, self._num_applied))
        self._service.router.configure(RouterConfig.of(config))
        self._telemetry.configure(config)
        self._watch.expect(config)
        routed = self._service.router.status(asyncio.get_running_loop().time())
        num_legs = {worker.worker_id: worker.num_legs for worker in routed.workers}
        self._controller.handle(Apply(pool_sizes(config), num_legs))

    def _check_fits(self, config: ClusterConfig) -> None:
        """Raises CapacityError."""
        more_may_come = not self._watch.are_complete(config)
        planned = plan(config.on(self._device), self._watch.nodes(config), more_may_come=more_may_come)
        planned.check(more_may_come=more_may_come)

    # the planner

    def planner(self) -> PlannerState:
        planning, now_s = self._planning, asyncio.get_running_loop().time()
        return PlannerState(
            mode=planning.desk.mode,
            terms=planning.terms,
            advice=planning.desk.latest,
            records=tuple(planning.desk.records),
            num_changes=planning.desk.num_changes,
            now_s=now_s,
        )

    def _configure_planner(self) -> None:
        config = self._config
        self._planning.configure(
            config, lambda: planner_terms(config, self._plan, self._layout, self._max_instances(config))
        )

    @property
    def _layout(self) -> KVLayout:
        model = open_checkpoint(resolve_model_path(self._config.model.path)).config
        return planned_layout(model, self._plan, self._config.kv.wire)

    def _max_instances(self, config: ClusterConfig) -> int:
        """Returns how many instances of both pools together have a place, as far as ranges allow."""
        ranges = [pool.allowed_instances for _, pool in config.pools.items()]

        def has_place(num_instances: int) -> bool:
            num_prefill = min(ranges[0].max, num_instances - ranges[1].min)
            sizes = {Role.PREFILL: num_prefill, Role.DECODE: num_instances - num_prefill}
            try:
                self._check_fits(config.sized(sizes))
            except CapacityError:
                return False
            return True

        low = max(1, sum(one.min for one in ranges))
        high = sum(one.max for one in ranges) + 1
        while high > low + 1:
            middle = (low + high) // 2
            if has_place(middle):
                low = middle
            else:
                high = middle
        return low

    def _resize(self, sizes: Mapping[Role, int]) -> None:
        """Changes the ratio, and nothing else. Raises CapacityError."""
        config = self._config.sized(sizes)
        self._check_fits(config)
        self._change_to(config)

    def _host_joined(self) -> None:
        self._controller.handle(HostJoined())
        self._configure_planner()

    async def drain(self, worker_ids: Sequence[str], shutdown: bool) -> None:
        fleet = self._controller.fleet
        known = {member.worker_id for member in fleet.status()}
        for worker_id in worker_ids:
            if worker_id not in known:
                raise InvalidRequest("worker_ids", worker_id, f"one of {', '.join(sorted(known)) or 'none'}")
        if shutdown:
            self._report_serving(False)  # before anything is refused
            await self._planning.close()
            self._service.handle(Closing())
            self._controller.handle(Shutdown())
        else:
            for worker_id in worker_ids or sorted(known):
                self._controller.handle(Drain(worker_id))
        async for _ in self._states():
            if shutdown and fleet.is_stopped:
                self._end()
                return
            waiting = {MemberState.DRAINING, MemberState.STOPPING}
            if not shutdown and not any(
                m.state in waiting for m in fleet.status() if m.worker_id in (worker_ids or known)
            ):
                return

    async def _states(self) -> AsyncIterator[None]:
        """Yields once now, and after each change."""
        while True:
            self._changed.clear()
            yield
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)

    # inside

    def _snapshot(self, num_spans: int, stall_s: float) -> Snapshot:
        router = self._service.router
        return Snapshot(
            status=router.status(asyncio.get_running_loop().time()),
            token_gaps=router.token_gaps,
            configured=pool_sizes(self._config),
            restarts={
                member.worker_id: (member.role, member.num_restarts)
                for member in self._controller.fleet.status()
            },
            hosts=Counter(host.state for host in self._watch.hosts.status(0.0)),
            planner=self.planner(),
            num_takeovers=self._spec.generation,
            num_spans=num_spans,
            stall_s=stall_s,
            version=__version__,
            model=self._config.model.name,
        )

    def _worker_spec(self, action: StartWorker) -> WorkerSpec:
        (pool,) = (pool for pool in self._plan.pools if pool.role is action.role)
        return WorkerSpec(
            worker_id=action.worker_id,
            incarnation=action.incarnation,
            role=action.role,
            config=self._config,
            device=self._device,
            num_blocks=None if pool.is_measured else pool.num_blocks,
            router_address=(self._host, self._control_port),
            token=self._spec.token,
            host=self._spec.host,
            log=self._spec.log,
            accept_open_ray=self._spec.accept_open_ray,
            memory_bytes=pool.instance_bytes if self._device == "cpu" else 0,
        )

    @property
    def _is_serving(self) -> bool:
        return self._controller.fleet.is_serving

    def _on_change(self) -> None:
        self._changed.set()
        self._status_feed.change()
        self._report_serving(self._is_serving)

    def _report_serving(self, serving: bool) -> None:
        if self._gateway is not None and serving is not self._reported_serving:
            self._reported_serving = serving
            self._gateway.set_serving(serving)

    def _end(self) -> None:
        self._ended.set()
        self._changed.set()
        self._status_feed.close()


class _PlannedFleet:
    """The workers, as the planner sees and resizes them."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def sizes(self) -> Mapping[Role, int]:
        return pool_sizes(self._head._config)

    def is_settled(self) -> bool:
        return self._head._controller.fleet.is_reconciled

    def start_s(self) -> float | None:
        known = [process.start_s for process in self._head._controller.processes.values()]
        times = [start_s for start_s in known if start_s is not None]
        return sum(times) / len(times) if times else None

    def resize(self, sizes: Mapping[Role, int]) -> None:
        self._head._resize(sizes)


def listen(host: str, port: int) -> socket.socket:
    """Opens the port for workers, before any are accepted: hosts are asked whether they reach it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)
