"""Plans for machines with GPUs."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CapacityError, ConfigError
from pdserve.core.messages import Role
from pdserve.engine.gpu import GPU_MEMORY_FRACTION, DeviceInfo, Node
from pdserve.planner.packing import Demand, Packing
from pdserve.planner.plan import Plan, make_plan

from .support import GIB, checkpoint, messages

H100 = "NVIDIA H100 80GB HBM3"
HALF = {"prefill": {"gpus_per_instance": 0.5}, "decode": {"gpus_per_instance": 0.5}}


def machine(
    num_gpus: int, name: str = "a", cores: int = 8, gpu_gib: float = 80, torch_cuda: str | None = "13.0"
) -> Node:
    """One whose own memory is scarce: what lies on GPUs does not count there."""
    size = int(gpu_gib * GIB)
    gpus = tuple(DeviceInfo(index, H100, f"GPU-{name}-{index}", size, size) for index in range(num_gpus))
    return Node(name, tuple(range(cores)), GIB, GIB, gpus, torch_cuda)


def planned(*nodes: Node, **config: Any) -> Plan:
    return make_plan(ClusterConfig.model_validate(config), checkpoint(), nodes)


def where(result: Plan) -> list[tuple[str, int, list[str]]]:
    return [
        (gpu.node, gpu.index, [role.value for role in gpu.instances]) for gpu in result.gpus if gpu.instances
    ]


def test_auto_means_gpus_where_available_and_else_the_cpu() -> None:
    assert (planned(machine(2)).device, planned(machine(2)).why_device) == ("cuda", "2 GPUs found")
    assert (planned(machine(0)).device, planned(machine(0)).why_device) == ("cpu", "no GPUs found")
    assert planned(machine(0, "a"), machine(1, "b")).device == "cuda"
    assert planned(machine(2), device="cpu").device == "cpu"
    assert planned(machine(2), device="cuda").why_device == "as configured"


def test_auto_leaves_gpus_alone_that_torch_cannot_use() -> None:
    result = planned(machine(1, torch_cuda=None))
    assert (result.device, result.gpus) == ("cpu", ())
    assert result.why_device == "torch was built without CUDA, so 1 GPU cannot be used"


def test_blocks_are_larger_on_gpus() -> None:
    assert planned(machine(2)).block_size == 64
    assert planned(machine(2), device="cpu").block_size == 16
    assert planned(machine(2), kv={"block_size": 32}).block_size == 32


def test_each_instance_has_a_gpu_and_fills_its_share() -> None:
    result = planned(machine(2))
    assert result.findings == ()
    assert where(result) == [("a", 0, ["prefill"]), ("a", 1, ["decode"])]
    for pool in result.pools:
        assert pool.gpu_share == 1.0
        assert pool.is_measured
        block_bytes = 64 * result.kv_bytes_per_token
        assert (
            80 * GIB * GPU_MEMORY_FRACTION - block_bytes
            < pool.instance_bytes
            <= 80 * GIB * GPU_MEMORY_FRACTION
        )


def test_a_pair_shares_one_gpu() -> None:
    result = planned(machine(1), pools=HALF)
    assert result.findings == ()
    assert where(result) == [("a", 0, ["prefill", "decode"])]
    assert 70 * GIB < result.gpus[0].planned_bytes <= 72 * GIB
    assert all(pool.instance_bytes <= 36 * GIB for pool in result.pools)


def test_the_larger_share_has_the_more_kv() -> None:
    pools = {"prefill": {"gpus_per_instance": 0.3}, "decode": {"gpus_per_instance": 0.7}}
    prefill, decode = planned(machine(1), pools=pools).pools
    assert decode.kv_cache_bytes - prefill.kv_cache_bytes == pytest.approx(0.4 * 72 * GIB, abs=16 << 20)


def test_a_cache_that_is_given_in_bytes_is_not_measured() -> None:
    pools = {"prefill": {"kv_cache_bytes": "8GiB"}, "decode": {}}
    prefill, decode = planned(machine(2), pools=pools).pools
    assert (prefill.is_measured, prefill.kv_cache_bytes, prefill.num_blocks) == (False, 8 * GIB, 1024)
    assert decode.is_measured


def test_a_pair_is_not_spread_over_machines() -> None:
    assert where(planned(machine(2, "a"), machine(2, "b"))) == [("a", 0, ["prefill"]), ("a", 1, ["decode"])]
    assert where(planned(machine(1, "a"), machine(1, "b"))) == [("a", 0, ["prefill"]), ("b", 0, ["decode"])]


def test_too_few_gpus_are_counted_out_with_a_way_out() -> None:
    result = planned(machine(1))
    assert messages(result) == [
        "pools: 1 prefill instance and 1 decode instance need 2 GPUs, but there is 1 on this machine, where 1"
        " decode instance found no room; lower instances, or set gpus_per_instance to a fraction so that"
        " instances share a GPU"
    ]
    with pytest.raises(CapacityError):
        result.check()


def test_instances_on_gpus_need_cores_too() -> None:
    (message,) = messages(planned(machine(2, cores=1)))
    assert message.startswith(
        "pools: 1 prefill instance and 1 decode instance need 2 cores, but there is 1 on this machine"
    )
    (message,) = messages(planned(machine(2), pools={"decode": {"cpus_per_instance": 9.0}}))
    assert message.startswith("pools.decode.cpus_per_instance: 9 cores for one instance, but there are 8")


def test_a_model_too_large_for_its_share_is_reported() -> None:
    assert messages(planned(machine(1, gpu_gib=40), pools=HALF)) == []
    result = planned(machine(1, gpu_gib=24), pools=HALF)
    first, second = messages(result)
    assert first.startswith(
        "GPU memory: a prefill instance needs 17.5 GiB (1 GiB of KV and 16.5 GiB beside it), but has 10.8 GiB"
    )
    assert (
        "on GPU 0 of a (0.9 of 24 GiB, times pools.prefill.gpus_per_instance: 0.5); raise gpus_per_instance"
        in first
    )
    assert second.startswith("GPU memory: a decode instance")
    with pytest.raises(CapacityError):
        result.check()


def test_an_absent_gpu_is_reported_with_the_expected_one() -> None:
    assert messages(planned(machine(0), device="cuda")) == [
        "device: got cuda, but no GPU was found; expected a machine with an NVIDIA driver and a GPU, or"
        " device: cpu"
    ]
    assert messages(planned(machine(1, torch_cuda=None), device="cuda", pools=HALF)) == [
        "device: got cuda, but torch was built without CUDA; expected a torch that was built for CUDA, or"
        " device: cpu"
    ]


def test_several_devices_an_instance_are_refused() -> None:
    pools = {"prefill": {"tensor_parallel": 2}, "decode": {"devices_per_instance": 2}}
    result = planned(machine(4), device="cuda", pools=pools)
    assert messages(result)[:2] == [
        "pools.prefill.tensor_parallel: got 2, expected 1 on device cuda: the ranks of an instance compute on"
        " processors alone",
        "pools.decode.devices_per_instance: got 2, expected 1 on device cuda: an instance computes on one"
        " GPU; cores of its host process are cpus_per_instance",
    ]
    with pytest.raises(ConfigError):
        result.check()


@pytest.mark.parametrize(
    ("device", "kernels", "expected"),
    [
        ("cuda", "native", "auto, triton"),
        ("cuda", "torch", "auto, triton"),
        ("cpu", "triton", "auto, native, amx, avx512_bf16, avx512, avx2, portable, torch"),
    ],
)
def test_kernels_belong_to_a_device(device: str, kernels: str, expected: str) -> None:
    message = f"kernels: got {kernels}, expected one of {expected} on device {device}"
    result = planned(machine(2), device=device, kernels=kernels)
    assert message in messages(result)
    with pytest.raises(ConfigError):
        result.check()


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_links_of_gpus_need_gpus(transport: str) -> None:
    message = f"kv.transport: got {transport}, which is for GPUs; expected auto, shm or gloo on device cpu"
    assert message in messages(planned(machine(2), device="cpu", kv={"transport": transport}))
    assert not [
        text
        for text in messages(planned(machine(2), device="cuda", kv={"transport": transport}))
        if "kv." in text
    ]


def test_a_demand_that_another_machine_meets_is_no_mistake() -> None:
    (finding,) = (
        one for one in planned(machine(0), kernels="triton").findings if one.message.startswith("kernels")
    )
    assert finding.error is CapacityError


GPU_NODES = st.lists(
    st.builds(
        machine,
        st.integers(0, 3),
        name=st.uuids().map(str),
        cores=st.integers(1, 4),
        gpu_gib=st.floats(8, 200),
    ),
    min_size=1,
    max_size=3,
)
GPU_DEMANDS = st.lists(
    st.builds(
        Demand,
        role=st.sampled_from([Role.PREFILL, Role.DECODE]),
        num_cpus=st.sampled_from([0.5, 1.0]),
        num_cores=st.just(1),
        fixed_bytes=st.integers(0, 4 * GIB),
        kv_bytes=st.none(),
        gpu_share=st.sampled_from([0.25, 0.3, 0.5, 1.0]),
    ),
    max_size=8,
)


@given(nodes=GPU_NODES, demands=GPU_DEMANDS)
def test_no_gpu_holds_more_than_it_has(nodes: list[Node], demands: list[Demand]) -> None:
    packing = Packing(demands, nodes)
    held = [
        (device, on_gpu)
        for load in packing.loads
        for device, on_gpu in zip(load.node.devices, load.on_gpus, strict=True)
    ]
    assert all(sum(demand.gpu_share or 0.0 for demand in on_gpu) <= 1.0 + 1e-6 for _, on_gpu in held)
    left = packing.gpu_kv_bytes(GPU_MEMORY_FRACTION)
    assert list(packing.gpu_memory_findings(left, GPU_MEMORY_FRACTION)) == []
    if all(num_bytes >= 0 for num_bytes in left.values()):
        for device, on_gpu in held:
            assert (
                sum(demand.fixed_bytes + left[demand.role] for demand in on_gpu)
                <= device.total_bytes * GPU_MEMORY_FRACTION
            )
