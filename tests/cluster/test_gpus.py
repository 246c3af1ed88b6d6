"""The assignment of GPUs to workers' actors by Ray, which we rely on and cannot choose."""

import os
from typing import Any

import pytest
import ray

from pdserve.cluster.actors import options_of, variables_of
from pdserve.cluster.nodes import RayNodes, with_resources
from pdserve.core.config import ClusterConfig
from pdserve.core.devices import DeviceKind
from pdserve.core.messages import Role
from pdserve.engine.gpu import DeviceInfo, Node
from pdserve.router.cores import Capacity, CoreAllocator
from pdserve.worker.spec import WorkerSpec

pytestmark = pytest.mark.cluster


def spec(device: DeviceKind, gpus: float) -> WorkerSpec:
    config = ClusterConfig.model_validate(
        {"pools": {"decode": {"gpus_per_instance": gpus, "cpus_per_instance": 0.1}}}
    )
    return WorkerSpec("decode-0", 1, Role.DECODE, config, device, None, ("127.0.0.1", 1), "secret", None)


class VisibleDevice:
    """The device visible to an actor's process."""

    def gpu(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ray_assigns_gpus_by_the_rule_that_we_assume() -> None:
    VisibleDevice.__module__ = "__main__"  # so that its code travels with it
    node_id = ray.get_runtime_context().get_node_id()
    allocator = CoreAllocator({node_id: Capacity(8, 2)})
    actors: list[Any] = []
    try:
        for number, share in enumerate((0.5, 0.7, 0.5, 0.3)):
            worker = spec("cuda", share)
            placement = allocator.take((f"decode-{number}", 1), worker.need)
            assert placement is not None
            actors.append(ray.remote(VisibleDevice).options(**options_of(worker, placement)).remote())
            assert ray.get(actors[-1].gpu.remote()) == str(placement.gpu)
            assert variables_of(worker)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID", "the order by which it counts"
    finally:
        for actor in actors:
            ray.kill(actor)


def test_a_worker_on_a_cpu_takes_no_gpu() -> None:
    worker = spec("cpu", 0.5)
    allocator = CoreAllocator({ray.get_runtime_context().get_node_id(): Capacity(8)})
    placement = allocator.take(worker.key, worker.need)
    assert placement is not None
    options = options_of(worker, placement)
    assert options["num_gpus"] is None
    assert "runtime_env" not in options, "it would keep the worker from a process that is there already"
    assert set(variables_of(worker)) == {"OMP_NUM_THREADS"}


async def test_a_machines_gpus_are_its_physical_ones() -> None:
    """Ray was given two, and there is no driver."""
    (node,) = await RayNodes("embedded", ("127.0.0.1", 1)).ask_all(60.0)
    assert node.name == ray.get_runtime_context().get_node_id()
    assert node.devices == ()
    assert set(node.cores) == os.sched_getaffinity(0)


def test_gpus_that_ray_was_not_given_are_not_counted() -> None:
    gpus = tuple(DeviceInfo(index, "L4", f"GPU-{index}", 24 << 30, 24 << 30) for index in range(4))
    node = Node("a", (0,), 1, 1, gpus, "13.0")
    assert with_resources(node, {"GPU": 2.0}).devices == gpus[:2]
    assert with_resources(node, {"CPU": 2.0}).devices == ()
