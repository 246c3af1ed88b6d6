"""The order in which instances get places or wait."""

from pdserve.core.messages import Role
from pdserve.core.needs import Need
from pdserve.router.cores import Capacity, CoreAllocator, Placement
from pdserve.router.places import Places

P, D = Role.PREFILL, Role.DECODE
ONE = Need(1, 1.0)


def places(wanted: dict[Role, int], **hosts: Capacity) -> Places:
    made = Places(CoreAllocator(hosts))
    made.wanted = wanted
    return made


def ask(made: Places, role: Role, count: int, need: Need = ONE) -> None:
    for number in range(count):
        made.ask((f"{role.value}-{number}", 1), role, need)


def placed(made: Places) -> list[str]:
    names = []
    while (found := made.next()) is not None:
        names.append(found[0][0])
    return names


def test_one_instance_of_each_pool_is_placed_first() -> None:
    made = places({P: 1, D: 3}, a=Capacity(2))
    ask(made, D, 3)
    ask(made, P, 1)
    assert sorted(placed(made)) == ["decode-0", "prefill-0"]


def test_pools_grow_by_their_ratio_without_moving_instances() -> None:
    made = places({P: 2, D: 6}, a=Capacity(4))
    ask(made, D, 6)
    ask(made, P, 2)
    assert sorted(placed(made)) == ["decode-0", "decode-1", "decode-2", "prefill-0"]
    before = made.cores.on("a")
    made.cores.open("b", Capacity(8))
    assert sorted(placed(made)) == ["decode-3", "decode-4", "decode-5", "prefill-1"]
    assert made.cores.on("a") == before
    assert len(made.cores.on("b")) == 4


def test_of_two_pools_first_instances_the_larger_is_placed_first() -> None:
    made = places({P: 1, D: 1}, a=Capacity(3), b=Capacity(1))
    ask(made, D, 1)
    ask(made, P, 1, Need(3, 1.0))
    assert placed(made) == ["prefill-0", "decode-0"]


def test_an_instance_that_fits_nowhere_delays_no_others_and_reports_its_need() -> None:
    made = places({P: 1, D: 1}, a=Capacity(1))
    ask(made, P, 1, Need(2, 1.0))
    ask(made, D, 1)
    assert placed(made) == ["decode-0"]
    assert made.why_waiting(("prefill-0", 1)).startswith(
        "prefill-0 needs 2 core(s) with 1 of each free, but of the cluster's 1"
    )


def test_a_host_takes_no_more_instances_than_its_memory_holds() -> None:
    made = places({D: 3}, small=Capacity(8, num_bytes=5 << 30), large=Capacity(1, num_bytes=64 << 30))
    ask(made, D, 4, Need(1, 1.0, num_bytes=2 << 30))
    assert len(placed(made)) == 3
    assert len(made.cores.on("small")) == 2
    assert made.why_waiting(("decode-3", 1)) == (
        "decode-3 needs 2 GiB of memory, but of the hosts with free cores none has more than 1 GiB left"
    )


def test_a_reopened_host_still_counts_its_running_instances() -> None:
    made = places({D: 2}, a=Capacity(2))
    made.adopt(("decode-0", 7), D, Placement("a", (0,)), ONE)
    made.adopt(("decode-9", 7), D, Placement("gone", (5,)), ONE)
    made.cores.close("a")
    ask(made, D, 1)
    assert placed(made) == []
    made.cores.open("a", Capacity(2))
    assert made.next() == (("decode-0", 1), Placement("a", (1,)))
    made.give_back(("decode-0", 7))
    made.give_back(("decode-9", 7))
    made.give_back(("unknown", 1))
    assert made.cores.num_taken("a") == (1.0, 0.0)


def test_a_worker_that_changes_its_pool_counts_in_the_new_one() -> None:
    made = places({P: 1, D: 1}, a=Capacity(2))
    ask(made, D, 1)
    assert placed(made) == ["decode-0"]
    made.assign("decode-0", P)
    made.ask(("prefill-1", 1), P, ONE)
    made.ask(("decode-1", 1), D, ONE)
    assert placed(made) == ["decode-1"]
