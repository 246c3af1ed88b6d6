"""Clusters that have more to do than room for it, and what happens there."""

from pdserve.core.messages import Leg, StepReport, StepTiming, WorkerLoad
from pdserve.core.request import FinishReason, Request
from pdserve.router.config import RouterConfig

from .cluster import Cluster, make_request, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None, max_prefill_backlog_tokens=1)


def request_of(client: str, request_id: str, num_tokens: int = 20, **values: object) -> Request:
    request = make_request(request_id, num_tokens, **values)  # type: ignore[arg-type]
    return Request(
        **{name: getattr(request, name) for name in request.__struct_fields__} | {"client": client}
    )


def one_at_a_time(max_queued_requests: int = 1024) -> Cluster:
    """A cluster of one worker whose room for one sequence is taken."""
    config = RouterConfig(max_queued_requests=max_queued_requests)
    cluster = Cluster(worker_info("both-0", max_batch_size=1), config=config)
    cluster.submit(make_request("running", max_tokens=1))
    return cluster


def finish(cluster: Cluster, worker_id: str = "both-0") -> str:
    """Ends the one-token request that is running there; returns the next running one."""
    transfer = cluster.spec(worker_id).transfer
    cluster.token(worker_id, 0, FinishReason.LENGTH)
    cluster.leg_ended(worker_id, Leg.PREFILL, transfer=transfer)
    return cluster.spec(worker_id).transfer.request_id


def teach(cluster: Cluster, token_s: float, count: int = 20) -> None:
    """Reports prefills of 100 tokens on prefill-0, each of the given duration."""
    timing = StepTiming(
        duration_s=100 * token_s,
        num_prefill_tokens=100,
        sum_prefill_squares=10_000,
        num_decode_sequences=0,
        num_context_tokens=0,
    )
    for _ in range(count):
        cluster.handle(StepReport(worker_id="prefill-0", incarnation=1, load=WorkerLoad(), timing=timing))
