"""Follows the hosts of the Ray cluster for `router.hosts.Hosts`, and carries out its decisions."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from math import isinf

from ..core.config import ClusterConfig
from ..core.devices import DeviceKind
from ..core.hosts import ExpectedHosts, HostState
from ..engine.gpu import Node
from ..router.cores import Capacity, Key
from ..router.fleet_events import HostJoined
from ..router.hosts import (
    WATCH_INTERVAL_S,
    CheckHost,
    ExpectHosts,
    HostChanged,
    HostChecked,
    HostEvent,
    HostRefused,
    Hosts,
    HostsSeen,
    HostSuspected,
    VacateHost,
)
from .host_facts import no_space
from .ports import InstanceResources, Nodes
from .settings import instance_resources

REQUEST_TIMEOUT_S = 10.0  # for Ray to take a request for hosts
log = logging.getLogger(__name__)


class HostWatch:
    """The watch, running from `start` to `close`. `on_vacate` is called with workers that must leave their
    host, `on_join` when a host may take workers for the first time, `on_change` after each change."""

    def __init__(self, hosts: Hosts, nodes: Nodes, device: DeviceKind, *, is_alone: bool) -> None:
        """`is_alone`: Ray is our own, and no other host can join it."""
        self.hosts = hosts
        self.on_vacate: Callable[[tuple[Key, ...]], None] = lambda workers: None
        self.on_join: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None
        self._nodes = nodes
        self._device = device
        self._is_alone = is_alone
        self._config: ClusterConfig  # in force
        self._resolved: dict[str, str] = {}  # names in files -> addresses
        self._checks: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._wanted: list[InstanceResources] = []  # the room that Ray's autoscaler has been asked for
        self._requests: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # of requests: the latest one is the last to arrive

    async def start(self, config: ClusterConfig) -> None:
        """Finds the hosts that are present; each is checked before it serves."""
        await self.resolve(config)
        self.expect(config)
        self.handle(HostsSeen(await self._nodes.seen()))
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def settle(self, timeout_s: float) -> None:
        """Returns when no host is being checked any more, or after `timeout_s`."""
        if self._checks:
            await asyncio.wait(self._checks, timeout=timeout_s)

    def are_complete(self, config: ClusterConfig) -> bool:
        """Whether all hosts of a configuration serve."""
        return self.hosts.are_complete(self._expected(config))

    def nodes(self, config: ClusterConfig) -> tuple[Node, ...]:
        """Returns the serving hosts of a configuration, the head's first, with the memory that instances may
        take: also that of those which are running there."""
        return tuple(map(self._node, self.hosts.serving(self._expected(config))))

    def _node(self, node_id: str) -> Node:
        node, num_bytes = self._nodes.node(node_id), self.hosts.capacity(node_id).num_bytes
        return node if isinf(num_bytes) else replace(node, available_memory_bytes=int(num_bytes))

    async def resolve(self, config: ClusterConfig) -> None:
        """Resolves the names of a configuration's hosts; one that does not resolve may still be a host's own
        name."""
        for name in config.hosts.addresses or ():
            with contextlib.suppress(OSError):
                found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
                self._resolved[name] = str(found[0][4][0])

    def expect(self, config: ClusterConfig) -> None:
        """Puts a configuration in force."""
        self._config = config
        expected = self._expected(config)
        self.handle(ExpectHosts(expected, config.join_timeout_s))
        if expected.can_grow or self._wanted:
            self._want(instance_resources(config, self._device) if expected.can_grow else [])

    def _want(self, instances: list[InstanceResources]) -> None:
        """Lets Ray's autoscaler start hosts for what has no room, and end those that nothing needs."""
        self._wanted = instances
        log.info("Ray's autoscaler is asked for hosts with room for %d instances", len(instances))
        task = asyncio.get_running_loop().create_task(self._request())
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _request(self) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await self._nodes.request(self._wanted)
            except Exception as error:
                log.warning(
                    "Ray's autoscaler cannot be asked for hosts: %s", str(error) or type(error).__name__
                )

    def suspect(self, node_id: str) -> None:
        """Suspects a host on which a worker was lost for no known reason. `on_change` is not called: no
        instance gains a place by this, and the fleet has yet to learn of the loss."""
        self._carry_out(HostSuspected(node_id))

    def refuse(self, node_id: str, full: tuple[tuple[str, int], ...]) -> None:
        """Refuses a host whose workers report that it is full."""
        self._carry_out(HostRefused(node_id, no_space(full)))

    def handle(self, event: HostEvent) -> None:
        self._carry_out(event)
        self.on_change()

    def _carry_out(self, event: HostEvent) -> None:
        for action in self.hosts.handle(event, asyncio.get_running_loop().time()):
            match action:
                case CheckHost(node_id):
                    check = asyncio.get_running_loop().create_task(self._check(node_id))
                    self._checks.add(check)
                    check.add_done_callback(self._checks.discard)
                case VacateHost(workers):
                    self.on_vacate(workers)
                case HostJoined():
                    self.on_join()
                case HostChanged(name, state, message):
                    is_odd = bool(message) and state is not HostState.CHECKING
                    log.log(
                        logging.WARNING if is_odd else logging.INFO,
                        "host %s: %s",
                        name,
                        message or state.value,
                    )

    async def close(self) -> None:
        tasks = [*self._checks, *self._requests]
        tasks += [] if self._following is None else [self._following]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._wanted:
            self._wanted = []
            await self._request()

    def _expected(self, config: ClusterConfig) -> ExpectedHosts:
        return ExpectedHosts() if self._is_alone else replace(config.hosts, resolved=self._resolved)

    async def _check(self, node_id: str) -> None:
        try:
            checked = await self._nodes.check(node_id, self._config, self._device)
        except Exception as error:  # without an answer the host would be in doubt for good
            log.exception("the check of host %s failed", self.hosts.names.get(node_id, node_id))
            failure = f"its check failed ({type(error).__name__}: {error}); it is repeated"
            checked = HostChecked(node_id, Capacity(0), failure)
        self.handle(checked)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                seen = await self._nodes.seen()
            except Exception as error:  # Ray's own head is slow or gone: hosts stay as they are
                log.warning("Ray does not list its hosts: %s: %s", type(error).__name__, error)
                continue
            self.handle(HostsSeen(seen))
