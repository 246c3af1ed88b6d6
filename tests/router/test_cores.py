"""The allocation of cores and of machines' GPUs."""

from pdserve.core.config import ClusterConfig
from pdserve.core.devices import DeviceKind
from pdserve.core.messages import Role
from pdserve.core.needs import Need
from pdserve.router.cores import Capacity, CoreAllocator, Placement
from pdserve.worker.spec import WorkerSpec

ONE_CORE = Need(1, 1.0)


def hosts(**capacities: Capacity) -> CoreAllocator:
    return CoreAllocator(capacities)


def take(allocator: CoreAllocator, *needs: Need) -> list[Placement]:
    """An allocator for workers that are named by a number."""
    placements = [allocator.take((f"w-{number}", 1), need) for number, need in enumerate(needs)]
    return [placement for placement in placements if placement is not None]


def test_each_instance_has_cores_of_its_own_on_the_emptiest_node() -> None:
    placements = take(hosts(a=Capacity(2), b=Capacity(3)), ONE_CORE, ONE_CORE, Need(2, 1.0))
    assert placements == [Placement("b", (0,)), Placement("a", (0,)), Placement("b", (1, 2))]


def test_instances_share_cores_when_configured_to() -> None:
    allocator = hosts(a=Capacity(1))
    assert take(allocator, Need(1, 0.5), Need(1, 0.5)) == [Placement("a", (0,))] * 2
    assert allocator.take(("w-9", 1), Need(1, 0.5)) is None
    assert (allocator.what_is_missing("w-9", Need(1, 0.5)) or "").startswith(
        "w-9 needs 1 core(s) with 0.5 of each free, but of the cluster's 1 core"
    )


def half(num_cores: int = 1) -> Need:
    return Need(num_cores, 1.0, 0.5)


def test_a_pair_that_can_share_a_gpu_does() -> None:
    placements = take(hosts(a=Capacity(8, 2), b=Capacity(8, 2)), half(), half(), half())
    assert [(one.node_id, one.gpu) for one in placements] == [("a", 0), ("a", 0), ("a", 1)]


def test_whole_gpu_instances_stay_on_one_machine_while_it_has_room() -> None:
    whole = Need(1, 1.0, 1.0)
    placements = take(hosts(a=Capacity(8, 2), b=Capacity(9, 2)), whole, whole, whole)
    assert [(one.node_id, one.gpu) for one in placements] == [("b", 0), ("b", 1), ("a", 0)]


def test_a_node_without_gpus_or_cores_is_skipped() -> None:
    allocator = hosts(many=Capacity(64), few=Capacity(1, 8), right=Capacity(2, 1))
    assert take(allocator, half(2)) == [Placement("right", (0, 1), 0)]
    allocator = hosts(a=Capacity(8, 1))
    assert len(take(allocator, half(), Need(1, 1.0, 0.75))) == 1
    assert (
        allocator.what_is_missing("w-1", Need(1, 1.0, 0.75))
        == "w-1 needs 1 core(s) with 1 of each free on a node with 0.75 of a GPU free, but of the cluster's 1"
        " GPU(s) only 0.5, and of its 8 core(s) only 7, are free"
    )


def test_a_workers_resources_go_to_the_next() -> None:
    allocator = hosts(a=Capacity(1, 1))
    need = Need(1, 1.0, 1.0)
    (placement,) = take(allocator, need)
    allocator.give_back(("w-0", 1))
    allocator.give_back(("unknown", 1))
    assert allocator.take(("w-0", 2), need) == placement


def test_workers_of_an_earlier_head_are_counted_where_they_are() -> None:
    allocator = hosts(a=Capacity(2, 2))
    allocator.take_back(("w-7", 1), Placement("a", (1,), 1), half())
    assert take(allocator, half()) == [Placement("a", (0,), 1)]


def spec(device: DeviceKind, **pool: float) -> WorkerSpec:
    config = ClusterConfig.model_validate({"pools": {"decode": pool}})
    return WorkerSpec("decode-0", 1, Role.DECODE, config, device, None, ("127.0.0.1", 1), "secret", None)


def test_what_an_instance_needs_follows_from_its_pool_and_its_device() -> None:
    assert spec("cpu", devices_per_instance=2, cpus_per_instance=1.0, gpus_per_instance=0.5).need == Need(
        2, 0.5
    )
    assert spec("cuda").need == Need(1, 1.0, 1.0)
    assert spec("cuda", gpus_per_instance=0.25, cpus_per_instance=0.5).need == Need(1, 0.5, 0.25)
    assert spec("cuda", cpus_per_instance=4.0).need == Need(4, 1.0, 1.0)
