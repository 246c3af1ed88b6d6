"""The cost of decisions at 10, 100, 1,000 and 4,000 workers, and how each cost grows.

    python -m bench.microbench.fleet_growth [--workers 10 100 1000 4000] [--only report choice]

CPU time of one call, in us: the median of many, of the real objects. The exponent is the slope of a line
through the logarithms: 0 is constant, 1 proportional to the number of workers."""

import argparse
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec import structs

from pdserve.core.messages import Role, StepReport, StepTiming, WorkerLoad
from pdserve.core.needs import Need
from pdserve.core.request import Request
from pdserve.router.admission import JobQueue
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.cores import Capacity, CoreAllocator
from pdserve.router.events import Submit, Tick, WorkerReady
from pdserve.router.fleet import Fleet
from pdserve.router.fleet_events import Apply, StartWorker
from pdserve.router.live_request import Job, LiveRequest
from pdserve.router.places import Places
from pdserve.router.prefix_index import PrefixIndex
from pdserve.router.supervisor import Supervisor

from .router import request, worker

HOST_CORES, WORKER_CORES = 192, 24
JOBS_PER_WORKER = 25  # 100,000 with 4,000 workers
NUM_BLOCKS = 6000

Call = Callable[[int], object]
Report = Callable[[int], StepReport]


def median_us(call: Call, count: int) -> float:
    times = []
    for number in range(count):
        started_s = time.thread_time()
        call(number)
        times.append(time.thread_time() - started_s)
    return statistics.median(times) * 1e6


def prompt(name: str, num_tokens: int) -> Request:
    rng = random.Random(name)
    return request(name, tuple(rng.randrange(50_000) for _ in range(num_tokens)))


def fleet_of(
    num_workers: int, config: RouterConfig, num_blocks: Callable[[int], int] = lambda number: NUM_BLOCKS
) -> Router:
    router = Router(config)
    for number in range(num_workers // 2):
        for role in (Role.PREFILL, Role.DECODE):
            info = structs.replace(
                worker(f"{role.value}-{number}", role),
                num_blocks=num_blocks(number),
                max_model_len=131_072,
                max_batch_size=256,
                max_batch_tokens=1 << 20,
            )
            router.handle(WorkerReady(info), 0.0)
    return router


def reports(num_workers: int, num_free_blocks: int) -> Report:
    """A step of a decode worker, each time of another one, that brings no token."""
    timing = StepTiming(
        num_prefill_tokens=0,
        sum_prefill_squares=0,
        num_decode_sequences=200,
        num_context_tokens=200_000,
        duration_s=0.02,
    )

    def report(number: int) -> StepReport:
        return StepReport(
            worker_id=f"decode-{number % (num_workers // 2)}",
            incarnation=1,
            load=WorkerLoad(num_free_blocks=num_free_blocks, num_running=200),
            timing=timing,
        )

    return report


def filled(router: Router, num_clients: int = 1, priority: int = 0) -> Router:
    """Submits requests, of so many clients, until ten wait."""
    number = 0
    while router.status(0.0).num_queued < 10 if number % 100 == 0 else True:
        fills = structs.replace(
            prompt(f"fills-{number}", 600), client=f"c{number % num_clients}", priority=priority
        )
        router.handle(Submit(fills), 0.0)
        number += 1
    return router


# the rows


def report_while_prompts_wait(num_workers: int) -> float:
    router = filled(
        fleet_of(num_workers, RouterConfig(max_queued_requests=1 << 30, max_prefill_backlog_tokens=512))
    )
    made = [reports(num_workers, 3000)(number) for number in range(1000)]
    return median_us(lambda number: router.handle(made[number], 1.0), len(made))


def report_while_decodes_wait(num_workers: int) -> float:
    config = RouterConfig(max_queued_requests=1 << 30, max_prefill_backlog_tokens=1 << 30)
    router = filled(fleet_of(num_workers, config, lambda number: 100))
    made = [reports(num_workers, 10)(number) for number in range(1000)]
    return median_us(lambda number: router.handle(made[number], 1.0), len(made))


def place_given_up(num_workers: int, num_clients: int = 1, priority: int = 0) -> float:
    """The choice of the dispatch that makes room for another client, of some two a decode worker."""
    config = RouterConfig(max_queued_requests=1 << 30, max_prefill_backlog_tokens=1 << 30)
    router = filled(fleet_of(num_workers, config, lambda number: 100), num_clients, priority)
    newcomer = structs.replace(prompt("n", 500), client="another")
    job = Job(LiveRequest(newcomer, 0.0), (0,), (), 0.0)
    assert router._dispatcher._room.victim(job) is not None
    return median_us(lambda number: router._dispatcher._room.victim(job), 20)


def place_of_lower_priority(num_workers: int) -> float:
    return place_given_up(num_workers, num_clients=num_workers, priority=7)


def unequal(num_workers: int) -> Router:
    return fleet_of(
        num_workers, RouterConfig(max_queued_requests=1 << 30), lambda number: NUM_BLOCKS + number
    )


def submit_with_unequal_capacities(num_workers: int) -> float:
    router = unequal(num_workers)
    made = [Submit(prompt(f"s{number}", 500)) for number in range(100)]
    return median_us(lambda number: router.handle(made[number], 0.0), len(made))


def decision_with_unequal_capacities(num_workers: int) -> float:
    router = unequal(num_workers)
    job = Job(LiveRequest(prompt("d", 500), 0.0), (0,), (), 0.0)
    return median_us(lambda number: router._placer.place(job), 100)


def started_fleet(num_workers: int) -> Fleet:
    fleet = Fleet()
    actions = fleet.handle(Apply({Role.PREFILL: num_workers // 2, Role.DECODE: num_workers // 2}), 0.0)
    for action in actions:
        assert isinstance(action, StartWorker)
        info = structs.replace(
            worker(action.worker_id, action.role), worker_id=action.worker_id, incarnation=action.incarnation
        )
        fleet.handle(WorkerReady(info), 1.0)
    return fleet


def event_of_the_fleet(num_workers: int) -> float:
    fleet = started_fleet(num_workers)

    def event(_: int) -> None:
        fleet.handle(Tick(), 1.0)
        fleet.next_tick_s()
        assert fleet.num_expected == 0

    return median_us(event, 200)


@dataclass(frozen=True)
class Launch:
    """An instance as the supervisor knows it."""

    key: tuple[str, int]
    role: Role
    need: Need


def event_while_workers_wait_for_cores(num_workers: int) -> float:
    """An event of the supervisor, with one worker in ten without a place."""
    hosts = {
        f"host-{number}": Capacity(HOST_CORES)
        for number in range(max(1, num_workers * 9 // 10 * WORKER_CORES // HOST_CORES))
    }
    need = Need(WORKER_CORES, 1.0)
    supervisor = Supervisor(
        Fleet(),
        Places(CoreAllocator(hosts)),
        lambda action: Launch((action.worker_id, action.incarnation), action.role, need),
    )
    supervisor.handle(Apply({Role.PREFILL: num_workers // 2, Role.DECODE: num_workers // 2}), 0.0)

    def event(_: int) -> None:
        supervisor.handle(Tick(), 0.0)
        while supervisor.settle(0.0):
            pass
        supervisor.next_tick_s()

    event(0)
    return median_us(event, 20)


def place_of_one_worker(num_workers: int) -> float:
    cores = CoreAllocator(
        {f"host-{number}": Capacity(HOST_CORES) for number in range(max(2, num_workers // 8))}
    )
    need = Need(WORKER_CORES, 1.0)
    return median_us(lambda number: cores.take((f"worker-{number}", 1), need), 8)


def waiting_jobs(num_workers: int, ready_s: float) -> tuple[JobQueue, list[Job]]:
    queue = JobQueue()
    jobs = []
    for number in range(JOBS_PER_WORKER * num_workers):
        job = Job(LiveRequest(request(f"r{number}", (1, 2)), 0.0), (0,), (), 0.0)
        job.ready_s = ready_s
        jobs.append(job)
    queue.push_front(jobs, 0.0)
    queue.wake(0.0)
    return queue, jobs


def cancelled_retry(num_workers: int) -> float:
    """A job that backs off is cancelled, as all others do."""
    queue, jobs = waiting_jobs(num_workers, 60.0)
    random.Random(0).shuffle(jobs)
    return median_us(lambda number: queue.remove(jobs[number]), 100)


def stream_that_reads_on(num_workers: int) -> float:
    """A paused stream returns to the front, in which all others wait, and is taken out."""
    queue, jobs = waiting_jobs(num_workers, 0.0)
    random.Random(0).shuffle(jobs)

    def read_on(number: int) -> None:
        queue.remove(jobs[number])
        queue.push_front([jobs[number]], 0.0)
        queue.wake(0.0)

    return median_us(read_on, 100)


def status_for_all_watchers(num_workers: int) -> float:
    router = fleet_of(num_workers, RouterConfig())
    fleet = started_fleet(num_workers)
    return median_us(lambda number: (router.status(1.0), fleet.status()), 20)


ROWS = {
    "step report while jobs wait for prompts": report_while_prompts_wait,
    "step report while jobs wait for a place to decode": report_while_decodes_wait,
    "choice of the dispatch that makes room": place_given_up,
    "choice of one of lower priority, a client a worker": place_of_lower_priority,
    "submit, all capacities differ": submit_with_unequal_capacities,
    "  its decision": decision_with_unequal_capacities,
    "event of the fleet": event_of_the_fleet,
    "event while a tenth of the workers wait for cores": event_while_workers_wait_for_cores,
    "cores of one worker": place_of_one_worker,
    "cancel of one retry of 25 a worker": cancelled_retry,
    "paused stream of 25 a worker reads on": stream_that_reads_on,
    "status of router and fleet, for all watchers": status_for_all_watchers,
}


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prefix_index(num_workers: int, num_blocks: int) -> str:
    """The memory and the longest calls of an index of `num_blocks`, each at one worker."""
    gc.collect()
    before, rng, index = resident_bytes(), random.Random(0), PrefixIndex()
    updates_s = []
    for number in range(num_workers):
        for hashes in batches(rng, num_blocks // num_workers):
            started_s = time.thread_time()
            index.update(f"worker-{number}", hashes, ())
            updates_s.append(time.thread_time() - started_s)
    num_bytes = resident_bytes() - before
    started_s = time.thread_time()
    index.remove_worker("worker-0")
    removed_ms = (time.thread_time() - started_s) * 1e3
    return (
        f"{num_bytes / num_blocks:.0f} bytes an entry, 1,024 blocks added in {max(updates_s) * 1e3:.1f} ms at"
        f" most, a worker removed in {removed_ms:.1f} ms"
    )


def batches(rng: random.Random, num_blocks: int) -> Iterator[list[bytes]]:
    for first in range(0, num_blocks, 1024):
        yield [rng.randbytes(16) for _ in range(min(1024, num_blocks - first))]


def exponent(sizes: list[int], costs: list[float]) -> float:
    logs = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs, strict=True)]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000, 4000])
    parser.add_argument("--only", nargs="+", help="words of the rows to print")
    parser.add_argument("--index-blocks", type=int, default=5_000_000)
    args = parser.parse_args()
    print(f"{'CPU time in us, with workers:':52}", *(f"{size:>9,}" for size in args.workers), "  exponent")
    for name, measure in ROWS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        costs = [measure(size) for size in args.workers]
        print(
            f"{name:52}",
            *(f"{cost:9.1f}" for cost in costs),
            f"  {exponent(args.workers, costs):8.2f}" if len(costs) > 1 else "",
            flush=True,
        )
    if args.only:
        return
    index = prefix_index(1000, args.index_blocks)
    print(f"prefix index, {args.index_blocks:,} blocks at 1,000 workers: {index}")


if __name__ == "__main__":
    main()
