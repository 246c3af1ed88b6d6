"""Small jobs pass a large one that has no room yet, and do not starve it."""

from pdserve.core.messages import Leg, Reserve, Role, Serve
from pdserve.core.request import FinishReason, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.events import Cancel, WorkerDraining, WorkerRole
from pdserve.router.reservation import AGING_S, AGING_TURNS, MAX_OWN_TURNS

from .cluster import BLOCK_SIZE, Cluster, make_request, worker_info

NUM_BLOCKS = 100


def half_full(num_decode: int = 1) -> Cluster:
    """Client "many" runs four streams of 12 blocks on each decode worker; a request of 80 blocks waits."""
    cluster = Cluster(
        worker_info("prefill-0", num_blocks=10_000, max_batch_tokens=1 << 20, max_batch_size=1000),
        *(worker_info(f"decode-{index}", num_blocks=NUM_BLOCKS) for index in range(num_decode)),
        config=RouterConfig(prefill_on_decode_factor=None),
    )
    for index in range(4 * num_decode):
        submit(cluster, f"stream{index}", 11, "many")
        prefilled(cluster, f"stream{index}")
    submit(cluster, "large", 79, "many")
    return cluster


def submit(cluster: Cluster, name: str, num_blocks: int, client: str, n: int = 1) -> None:
    first_token = 10_000 * sum(len(commands) for commands in cluster.sent.values())
    cluster.submit(make_request(name, num_blocks * BLOCK_SIZE, n=n, client=client, first_token=first_token))


def attempt_at_decode(cluster: Cluster, name: str) -> tuple[str, TransferId] | None:
    for worker, commands in cluster.sent.items():
        for command in commands:
            if isinstance(command, Reserve | Serve) and command.spec.transfer.request_id == name:
                return worker, command.spec.transfer
    return None


def prefilled(cluster: Cluster, name: str, num_choices: int = 1) -> None:
    found = attempt_at_decode(cluster, name)
    assert found is not None
    for choice in range(num_choices):
        cluster.output("prefill-0", found[1], 0, choice=choice)
    cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=found[1])


def finish(cluster: Cluster, name: str, num_choices: int = 1) -> None:
    found = attempt_at_decode(cluster, name)
    assert found is not None
    for choice in range(num_choices):
        cluster.output(found[0], found[1], 1, FinishReason.STOP, choice=choice)
    cluster.leg_ended(found[0], Leg.DECODE, transfer=found[1])


def is_dispatched(cluster: Cluster, name: str) -> bool:
    return attempt_at_decode(cluster, name) is not None


def test_small_requests_pass_a_large_one_that_has_no_room() -> None:
    cluster = half_full()
    assert not is_dispatched(cluster, "large")
    for index in range(5):
        submit(cluster, f"small{index}", 1, "many")
        assert is_dispatched(cluster, f"small{index}")


def test_the_large_request_gets_room_in_time_however_many_small_ones_arrive() -> None:
    cluster = half_full()
    names = [f"stream{index}" for index in range(4)]
    for index in range(200):
        cluster.now_s += AGING_S / 50
        submit(cluster, f"small{index}", 3, "many")
        if is_dispatched(cluster, f"small{index}"):
            prefilled(cluster, f"small{index}")
            names.append(f"small{index}")
        if index % 2:
            finish(cluster, names.pop(0))
        if is_dispatched(cluster, "large"):
            break
    assert is_dispatched(cluster, "large")


def test_a_client_gets_few_turns_past_its_own_large_request() -> None:
    """They end one after the other, so fast that no time passes."""
    cluster = half_full()
    finish(cluster, "stream0")
    running = [f"stream{index}" for index in range(1, 4)]
    waiting: list[str] = []
    num_turns = 0
    for index in range(200):
        submit(cluster, f"small{index}", 11, "many")
        waiting.append(f"small{index}")
        if is_dispatched(cluster, waiting[0]):
            running.append(waiting.pop(0))
            num_turns += 1
            prefilled(cluster, running[-1])
        finish(cluster, running.pop(0))
        if not running or is_dispatched(cluster, "large"):
            break
    assert is_dispatched(cluster, "large")
    assert num_turns <= 2 * AGING_TURNS


def test_a_clients_own_requests_wait_for_its_large_one_once_enough_have_passed() -> None:
    """They would run beside the room that is held, and others would use it as the client holds so much."""
    cluster = half_full(num_decode=3)
    names = [f"small{index}" for index in range(MAX_OWN_TURNS + 5)]
    for name in names:
        submit(cluster, name, 1, "many")
    assert [is_dispatched(cluster, name) for name in names] == [True] * MAX_OWN_TURNS + [False] * 5
    submit(cluster, "other", 1, "other")
    assert is_dispatched(cluster, "other")
    for name in [f"stream{index}" for index in range(12)] + ["other"]:
        if name == "other":
            prefilled(cluster, name)
        finish(cluster, name)
    assert is_dispatched(cluster, "large") and all(is_dispatched(cluster, name) for name in names)


def test_its_room_is_held_on_one_worker_only() -> None:
    cluster = half_full(num_decode=2)
    cluster.tick(AGING_S)
    for index in range(6):
        submit(cluster, f"small{index}", 3, "many")
    found = [attempt_at_decode(cluster, f"small{index}") for index in range(6)]
    assert len({place[0] for place in found if place is not None}) == 1 and None not in found


def test_its_room_is_held_elsewhere_when_its_worker_changes_its_role() -> None:
    cluster = half_full(num_decode=2)
    cluster.tick(AGING_S)
    submit(cluster, "small", 3, "many")
    place = attempt_at_decode(cluster, "small")
    assert place is not None
    (held,) = {"decode-0", "decode-1"} - {place[0]}
    cluster.handle(WorkerDraining(held))
    cluster.handle(WorkerRole(held, Role.PREFILL))
    cluster.tick(AGING_S)
    submit(cluster, "next", 3, "many")
    assert not is_dispatched(cluster, "next")


def test_a_passed_request_takes_room_from_a_client_that_runs_more() -> None:
    cluster = Cluster(
        worker_info("prefill-0", num_blocks=10_000, max_batch_tokens=1 << 20, max_batch_size=1000),
        worker_info("decode-0", num_blocks=NUM_BLOCKS),
        config=RouterConfig(prefill_on_decode_factor=None),
    )
    submit(cluster, "stream", 47, "many")
    prefilled(cluster, "stream")
    submit(cluster, "huge", 89, "other")
    for index in range(3):
        submit(cluster, f"small{index}", 1, "many")
        prefilled(cluster, f"small{index}")
    cluster.tick()
    assert cluster.aborts("decode-0") and not is_dispatched(cluster, "huge")


def test_room_that_is_held_is_free_again_when_the_request_ends() -> None:
    cluster = half_full()
    cluster.tick(AGING_S)
    submit(cluster, "small", 3, "many")
    assert not is_dispatched(cluster, "small")
    cluster.handle(Cancel("large"))
    assert is_dispatched(cluster, "small")


def test_a_client_that_holds_less_uses_room_that_another_waits_for() -> None:
    cluster = half_full()
    cluster.tick(AGING_S)
    submit(cluster, "theirs", 3, "other")
    assert is_dispatched(cluster, "theirs")
    prefilled(cluster, "theirs")
    for index in range(4):
        finish(cluster, f"stream{index}")
    assert is_dispatched(cluster, "large")


def test_room_is_held_against_a_client_that_holds_more() -> None:
    cluster = half_full()
    submit(cluster, "huge", 79, "other")
    cluster.tick(AGING_S)
    for index in range(3):
        finish(cluster, f"stream{index}")
    cluster.tick(AGING_S)
    submit(cluster, "small", 3, "many")
    assert not is_dispatched(cluster, "small")


def test_a_client_with_many_large_requests_does_not_hold_up_anothers() -> None:
    cluster = half_full()
    for index in range(100):
        submit(cluster, f"large{index}", 79, "many")
    assert not cluster.aborts("decode-0")
    submit(cluster, "theirs", 79, "other")
    assert cluster.aborts("decode-0"), "a stream gives up its place, as for any client that runs nothing"
    submit(cluster, "small", 1, "third")
    assert is_dispatched(cluster, "small")


def test_clients_whose_large_requests_were_passed_take_turns() -> None:
    cluster = half_full()
    waiting = [f"{client}{index}" for index in range(3) for client in ("a", "b", "c", "d")]
    for name in waiting:
        submit(cluster, name, 79, name[0])
    for index in range(4):
        finish(cluster, f"stream{index}")
    served = ""
    while len(served) < 8:
        (name,) = (name for name in waiting if is_dispatched(cluster, name))
        served += name[0]
        waiting.remove(name)
        prefilled(cluster, name)
        finish(cluster, name)
    assert sorted(served[:4]) == sorted(served[4:]) == ["a", "b", "c", "d"]


def test_large_requests_that_were_passed_do_not_keep_out_a_client_that_has_had_less() -> None:
    cluster = Cluster(
        worker_info("prefill-0", num_blocks=10_000, max_batch_tokens=1 << 20, max_batch_size=1000),
        worker_info("decode-0", num_blocks=NUM_BLOCKS, max_batch_size=2),
        config=RouterConfig(prefill_on_decode_factor=None),
    )
    submit(cluster, "stream", 11, "many")
    prefilled(cluster, "stream")
    waiting = [f"{client}{index}" for index in range(3) for client in ("a", "b")]
    for name in waiting:
        submit(cluster, name, 94, name[0], n=2)
    finish(cluster, "stream")
    submit(cluster, "c", 8, "c", n=2)
    waiting.append("c")
    served = ""
    for _ in range(3):
        (name,) = (name for name in waiting if is_dispatched(cluster, name))
        served += name[0]
        waiting.remove(name)
        prefilled(cluster, name, num_choices=2)
        finish(cluster, name, num_choices=2)
    assert sorted(served) == ["a", "b", "c"]


def test_a_request_that_is_not_large_keeps_its_place() -> None:
    cluster = half_full()
    submit(cluster, "four", 40, "other")
    submit(cluster, "medium", 11, "many")
    assert not is_dispatched(cluster, "medium")
    submit(cluster, "small", 1, "many")
    assert not is_dispatched(cluster, "small")


def test_any_worker_that_has_room_is_found() -> None:
    """The least loaded ones may have few sequences and no blocks."""
    cluster = Cluster(
        worker_info("prefill-0", num_blocks=10_000, max_batch_tokens=1 << 20, max_batch_size=1000),
        worker_info("decode-4", num_blocks=NUM_BLOCKS, max_batch_size=4),
        config=RouterConfig(prefill_on_decode_factor=None),
    )
    for index in range(3):
        submit(cluster, f"thin{index}", 8, "many")
        prefilled(cluster, f"thin{index}")
    for index in range(4):
        cluster.add(worker_info(f"decode-{index}", num_blocks=NUM_BLOCKS))
    for index in range(4):
        submit(cluster, f"wide{index}", 89, "many")
        prefilled(cluster, f"wide{index}")
    load = {worker.worker_id: worker.num_legs for worker in cluster.router.status(0.0).workers}
    assert load["decode-4"] == 3, load
    submit(cluster, "job", 20, "many")
    found = attempt_at_decode(cluster, "job")
    assert found is not None and found[0] == "decode-4"
