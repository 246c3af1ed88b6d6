"""The head passes the plan for GPUs on to its workers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.core.config import ClusterConfig
from pdserve.core.errors import PdserveError
from pdserve.core.messages import Role
from pdserve.engine.checkpoint import open_checkpoint, resolve_model_path
from pdserve.engine.gpu import DeviceInfo, Node
from pdserve.head.head import Head
from pdserve.head.settings import vacated
from pdserve.head.spec import HeadSpec
from pdserve.planner.plan import plan
from pdserve.planner.priors import GPU_PEAKS, REACHED, priors, rates_of
from pdserve.router.cores import Placement
from pdserve.router.fleet_events import StartWorker
from pdserve.worker.spec import WorkerSpec

H100, UNKNOWN = "NVIDIA H100 80GB HBM3", "NVIDIA H999"


def node(name: str = H100, num_gpus: int = 2) -> Node:
    gpus = tuple(DeviceInfo(index, name, f"GPU-{index}", 80 << 30, 80 << 30) for index in range(num_gpus))
    return Node("here", (0, 1), 8 << 30, 8 << 30, gpus, "13.0")


def worker(config: ClusterConfig, *nodes: Node) -> WorkerSpec:
    unused: Any = SimpleNamespace()
    head = Head(HeadSpec(token="secret", host="127.0.0.1"), unused, unused, "127.0.0.1")
    head._config, head._plan = config, plan(config, nodes)
    head._plan.check()
    head._device, head._control_port = head._plan.device, 1
    return head._worker_spec(StartWorker(Role.DECODE, "decode-0", 1))


def test_workers_on_gpus_size_their_blocks_unless_configured() -> None:
    spec = worker(ClusterConfig(), node())
    assert (spec.device, spec.num_blocks) == ("cuda", None)
    configured = ClusterConfig.model_validate({"pools": {"decode": {"kv_cache_bytes": "1GiB"}}})
    num_blocks = worker(configured, node()).num_blocks
    assert num_blocks is not None
    assert num_blocks > 0


def test_workers_on_cpus_get_their_number_of_blocks() -> None:
    spec = worker(ClusterConfig(), node(num_gpus=0))
    assert spec.device == "cpu"
    assert spec.num_blocks is not None


def test_a_worker_knows_the_device_and_not_how_it_was_chosen() -> None:
    """The configuration stays as it was written, so that the same file can be applied to the running
    cluster."""
    spec = worker(ClusterConfig(), node())
    assert spec.config.device == "auto"
    assert spec.device == "cuda"


@pytest.mark.parametrize(("name", "bytes_per_s"), [(H100, 3.35e12), (UNKNOWN, GPU_PEAKS.bytes_per_s)])
def test_the_first_predictions_assume_the_present_gpu(name: str, bytes_per_s: float) -> None:
    planned = plan(ClusterConfig(), [node(name)])
    shape = open_checkpoint(resolve_model_path("embedded")).config
    found = priors(shape, planned, rates_of(planned))
    assert found.decode_context_token_s == pytest.approx(planned.kv_bytes_per_token / (REACHED * bytes_per_s))
    planned = plan(ClusterConfig(), [node(num_gpus=0)])
    on_cores = priors(shape, planned, rates_of(planned))
    assert on_cores.prefill_token_s > 100 * found.prefill_token_s


def test_a_new_head_plans_with_the_memory_that_living_workers_hold() -> None:
    config = ClusterConfig()
    before = replace(node(num_gpus=0), available_memory_bytes=4 << 30)
    first = worker(config, before)
    free = replace(before, available_memory_bytes=before.available_memory_bytes - 2 * first.memory_bytes)
    with pytest.raises(PdserveError):
        worker(config, free)
    living = [(first, Placement("here", (0,))), (first, Placement("here", (1,)))]
    assert worker(config, vacated(free, living)) == first
    elsewhere = [(first, Placement("there", (0,)))]
    assert vacated(free, elsewhere) == free
    assert vacated(free, 9 * living).available_memory_bytes == free.total_memory_bytes
