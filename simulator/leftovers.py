"""Resources still held, and disagreements between the parts of a cluster; none once all is idle."""

from collections.abc import Iterator, Sequence

from ..router.fleet_member import MemberState
from ..router.prefix_index import block_keys
from .simulated_head import SimulatedHead
from .simulated_worker import SimulatedWorker


def leftovers(head: SimulatedHead, alive: Sequence[SimulatedWorker], now_s: float) -> list[str]:
    """Returns descriptions of the leftovers of the head and the running workers."""
    left = [f"router: request {request_id}" for request_id in head.clients]
    workers = head.router.status(now_s).workers
    left += [f"router: {worker.num_legs} legs at {worker.worker_id}" for worker in workers if worker.num_legs]
    for worker in alive:
        left += [f"{worker.spec}: {held}" for held in _held(worker)]
    members = {
        (m.worker_id, m.incarnation): m.role for m in head.fleet.status() if m.state is MemberState.READY
    }
    if (known := {(worker.worker_id, worker.incarnation): worker.role for worker in workers}) != members:
        left.append(f"the fleet has {members}, the router knows {known}")
    if (there := {worker.spec.key for worker in alive}) != members.keys():
        left.append(f"the fleet has {sorted(members)}, there are {sorted(there)}")
    left += [
        f"{m.worker_id} is {m.state.value}" for m in head.fleet.status() if m.state is not MemberState.READY
    ]
    left += [
        f"the router knows {len(head.router.known_blocks(worker.spec.worker_id))} blocks that {worker.spec}"
        f" caches, it has {worker.pool.num_cached_blocks}"
        for worker in alive
        if head.router.known_blocks(worker.spec.worker_id) != set(block_keys(worker.pool.cached_hashes))
    ]
    return left


def _held(worker: SimulatedWorker) -> Iterator[str]:
    if worker.worker.num_legs:
        yield f"{worker.worker.num_legs} legs"
    if worker.pool.num_free_blocks != worker.pool.num_blocks:
        yield f"{worker.pool.num_blocks - worker.pool.num_free_blocks} blocks"
    if worker.transfers.num_open:
        yield f"{worker.transfers.num_open} transfers in parts"
    for rank in worker.ranks:
        if rank.store.leases:
            yield f"leases of {', '.join(map(str, rank.store.leases))}"
        if rank.hub.num_links > rank.local.config.max_links:
            yield f"{rank.hub.num_links} links"
        if rank.hub.num_transfers:
            yield f"{rank.hub.num_transfers} transfers"
