"""The hosts of the Ray cluster, and their properties."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import __version__
from ..core.config import ClusterConfig
from ..core.devices import DeviceKind
from ..engine.gpu import Node
from ..head.host_facts import HostFacts, look, no_space, refusal, warning
from ..head.ports import InstanceResources
from ..router.cores import Capacity
from ..router.hosts import HostChecked, SeenHost
from .actors import reason_of
from .ray_folder import session_folder

CHECK_TIMEOUT_S = 20.0  # for a process to start on the host and answer
NODE_TYPE = "ray.io/node-group"  # Ray's label for a cloud's node type


def _look(model_path: str, router_address: tuple[str, int] | None) -> dict[str, Any]:
    return look(model_path, router_address, str(session_folder()))


_look_there: Any = ray.remote(num_cpus=0, max_retries=0)(_look)


class RayNodes:
    """Asks Ray for the hosts, and the hosts for their properties. The host of this process is the head's."""

    def __init__(self, model_path: str, router_address: tuple[str, int]) -> None:
        self._model_path = model_path
        self._router_address = router_address
        self._head = str(ray.get_runtime_context().get_node_id())
        self._resources: Mapping[str, Mapping[str, float]] = {}  # by node id, as declared to Ray
        self._facts: dict[str, HostFacts] = {}
        self._asking: dict[str, asyncio.Task[str]] = {}  # answers that nothing has awaited yet

    async def seen(self) -> tuple[SeenHost, ...]:
        """Returns the hosts that are alive, the head's first."""
        nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        self._resources = {node["NodeID"]: node["Resources"] for node in nodes}
        found = [
            SeenHost(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["NodeManagerHostname"],
                node["Labels"].get(NODE_TYPE, ""),
                node["NodeID"] == self._head,
            )
            for node in nodes
        ]
        return tuple(sorted(found, key=lambda host: not host.is_head))

    def node(self, node_id: str) -> Node:
        """Returns the resources of a host that has answered, as far as Ray may use them."""
        return with_resources(self._facts[node_id].node, self._resources.get(node_id, {}))

    async def ask_all(self, timeout_s: float) -> tuple[Node, ...]:
        """Returns all hosts that answer in time, the head's first; the others' answers may arrive later."""
        for host in await self.seen():
            self._asking[host.node_id] = asyncio.create_task(self._ask(host.node_id))
        done, _ = await asyncio.wait(self._asking.values(), timeout=timeout_s)
        return tuple(
            self.node(name) for name, task in self._asking.items() if task in done and not task.result()
        )

    async def ask_here(self) -> tuple[Node, ...]:
        """Returns the head's host alone."""
        await self.seen()
        await self._ask(self._head)
        return (self.node(self._head),)

    async def _ask(self, node_id: str) -> str:
        """Collects the host's facts. Returns why they are unavailable, and the fix; empty on success."""
        if node_id == self._head:
            answer = await asyncio.to_thread(_look, self._model_path, None)
            self._facts[node_id] = HostFacts.parse(answer, node_id)
            return ""
        there: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asked = _look_there.options(scheduling_strategy=there).remote(self._model_path, self._router_address)
        try:
            self._facts[node_id] = HostFacts.parse(await asyncio.wait_for(asked, CHECK_TIMEOUT_S), node_id)
        except TimeoutError:
            ray.cancel(asked, force=True)
            return (
                f"it has not answered within {CHECK_TIMEOUT_S:g} s: it is frozen, overloaded or cut off from"
                " the head; check that processes start there, and that all TCP between the hosts passes"
                " the firewalls"
            )
        except (TaskUnschedulableError, NodeDiedError):
            return "it has left; it is used again once Ray runs there again (`ray up` starts it)"
        except WorkerCrashedError as error:
            return (
                f"processes end as they start there ({reason_of(error)}); make room in its memory and in"
                " Ray's folder, which is in ~/.pdserve with `ray up`, or see Ray's logs in that"
            )
        except (RayError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = reason_of(error) if isinstance(error, RayError) else f"{type(error).__name__}: {error}"
            return (
                f"pdserve does not answer there ({reason}); see whether pdserve {__version__} is installed"
                " there"
            )
        return ""

    async def request(self, instances: Sequence[InstanceResources]) -> None:
        """Asks Ray's autoscaler, which keeps the request until the next one."""
        bundles = [
            {"CPU": one.num_cpus} | ({} if one.gpu_share is None else {"GPU": one.gpu_share})
            for one in instances
        ]
        await asyncio.to_thread(request_resources, bundles=bundles)

    async def check(self, node_id: str, config: ClusterConfig, device: DeviceKind) -> HostChecked:
        """Asks the host, and judges whether instances may start there."""
        asked_s = time.time()
        asked = self._asking.pop(node_id, None)
        failure = await (self._ask(node_id) if asked is None else asked)
        if failure:
            return HostChecked(node_id, Capacity(0), failure)
        there, is_head = self._facts[node_id], node_id == self._head
        node = self.node(node_id)
        num_bytes = node.available_memory_bytes if device == "cpu" else inf
        capacity = Capacity(len(node.cores), len(node.usable_devices), num_bytes)
        if is_head:
            return HostChecked(node_id, capacity, no_space(there.full))
        now_s = time.time()
        here = replace(self._facts[self._head], clock_s=(asked_s + now_s) / 2)
        return HostChecked(
            node_id,
            capacity,
            refusal(here, replace(there, node=node), config, device, self._router_address),
            warning(here, there, device, now_s - asked_s),
        )


def with_resources(node: Node, resources: Mapping[str, float]) -> Node:
    """Limits a node to the cores and GPUs that Ray was given, which may be fewer than exist."""
    num_cores = int(resources.get("CPU", 0))
    return replace(node, cores=node.cores[:num_cores], devices=node.devices[: int(resources.get("GPU", 0))])
