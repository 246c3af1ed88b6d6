"""The machines of a cluster of several, as the head hears of them."""

from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster import nodes as nodes_module
from pdserve.cluster.nodes import RayNodes
from pdserve.engine.gpu import DeviceInfo, Node

A, B, C = ("a" * 56, "b" * 56, "c" * 56)
GPUS = tuple(DeviceInfo(index, "NVIDIA L4", f"GPU-{index}", 24 << 30, 24 << 30) for index in range(2))


def alive(name: str, is_alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": is_alive, "Resources": resources}


async def test_a_machine_with_gpus_is_asked_for_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [alive(A, CPU=4.0, memory=8.0), alive(B, CPU=2.0, memory=6.0, GPU=2.0), alive(C, False, CPU=1.0, GPU=8.0)]
    monkeypatch.setattr(nodes_module, "ray", SimpleNamespace(nodes=lambda: machines))
    asked: list[str] = []

    async def there(name: str) -> Node:
        asked.append(name)
        return Node("itself", (0,), 1, 1, GPUS, "13.0")

    task = SimpleNamespace(
        options=lambda scheduling_strategy: SimpleNamespace(remote=lambda: there(scheduling_strategy.node_id))
    )
    monkeypatch.setattr(nodes_module, "_probe_there", task)
    nodes = RayNodes()
    expected = (Node(A, (0, 1, 2, 3), 8, 8), Node(B, (0, 1), 6, 6, GPUS, "13.0"))
    assert await nodes.probe() == expected
    assert await nodes.probe() == expected
    assert asked == [B]
