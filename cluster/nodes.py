"""The machines of the Ray cluster, as the planner counts them; their names are Ray's node ids."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..engine.gpu import Node, probe_node

_probe_there: Any = ray.remote(num_cpus=0)(probe_node)


class RayNodes:
    """Remembers what it was told of GPUs: asking another machine takes it a process, and GPUs stay where they are."""

    def __init__(self) -> None:
        self._seen: dict[str, Node] = {}  # machines with GPUs, by name

    async def probe(self) -> tuple[Node, ...]:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) == 1:
            (here,) = alive
            return (with_gpus_of(replace(probe_node(), name=here["NodeID"]), here["Resources"]),)
        return tuple(await asyncio.gather(*(self._node(node["NodeID"], node["Resources"]) for node in alive)))

    async def _node(self, name: str, resources: Mapping[str, float]) -> Node:
        """Ray knows a machine's cores and memory, the machine itself its GPUs."""
        memory = int(resources.get("memory", 0))
        node = Node(name, tuple(range(int(resources.get("CPU", 0)))), memory, memory)
        if not resources.get("GPU"):
            return node
        if name not in self._seen:
            there: Any = NodeAffinitySchedulingStrategy(name, soft=False)
            self._seen[name] = await _probe_there.options(scheduling_strategy=there).remote()
        seen = self._seen[name]
        return with_gpus_of(replace(node, devices=seen.devices, torch_cuda=seen.torch_cuda), resources)


def with_gpus_of(node: Node, resources: Mapping[str, float]) -> Node:
    """Ray may have been given fewer GPUs than there are."""
    return replace(node, devices=node.devices[: int(resources.get("GPU", 0))])
