"""The router as `pdserve status` and metrics see it: frozen snapshots and counters."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from ..core.messages import Role, WorkerLoad
from ..core.request import FinishReason
from .registered_worker import RegisteredWorker, RoutingState
from .registry import Registry


@dataclass(slots=True)
class Counters:
    """Totals since the router's start."""

    submitted: int = 0  # admitted requests
    finished: int = 0  # ended on their own
    cancelled: int = 0
    expired: int = 0  # deadline passed, or could no longer be met
    # of those, ended before they cost a prefill, as their first token would have come too late
    hopeless: int = 0
    failed: int = 0  # ended with an error
    rejected: int = 0  # refused because the queue was full
    dispatched: int = 0
    served_on_one: int = 0  # of those, both phases on one worker
    beyond_itl: int = 0  # of those, where the time between tokens is predicted to miss the SLO
    retried: int = 0  # dispatches that failed and were repeated
    unread: int = 0  # streams taken from their workers because their clients did not read
    displaced: int = 0  # dispatches taken back to make room for clients that ran little
    resumed: int = 0  # streams that went on at another attempt
    prompt_tokens: int = 0  # of requests that got their first token
    tokens: int = 0  # forwarded to clients
    stale: int = 0  # messages of lost incarnations, dropped

    def count_end(self, reason: FinishReason | None) -> None:
        """Counts a request's ending; None or a normal reason: it ended by itself."""
        if reason is FinishReason.CANCELLED:
            self.cancelled += 1
        elif reason is FinishReason.DEADLINE:
            self.expired += 1
        elif reason in (FinishReason.ERROR, FinishReason.FATAL, FinishReason.INVALID):
            self.failed += 1
        else:
            self.finished += 1


class RoutedWorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's row."""

    worker_id: str
    incarnation: int
    role: Role
    state: RoutingState
    node: str
    devices: tuple[str, ...]
    num_legs: int  # dispatches open there
    num_queued_tokens: int  # prompt tokens given to it and not yet prefilled
    num_blocks: int
    load: WorkerLoad  # as last reported
    tokens_per_s: float
    stalled_s: float  # how long it has had sequences to compute without ending a step
    prefix_hit_rate: float  # cached fraction of the prompt tokens prefilled there


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one instant."""

    workers: tuple[RoutedWorkerStatus, ...]
    num_requests: int  # live
    num_queued: int
    num_workers_expected: int
    counters: Counters
    degraded: str | None  # describes how serving deviates from the configuration


def worker_status(worker: RegisteredWorker, now_s: float) -> RoutedWorkerStatus:
    return RoutedWorkerStatus(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        role=worker.role,
        state=worker.state,
        node=worker.info.node,
        devices=worker.info.devices,
        num_legs=len(worker.open_legs),
        num_queued_tokens=worker.num_queued_tokens,
        num_blocks=worker.info.num_blocks,
        load=worker.load,
        tokens_per_s=worker.tokens_per_s,
        stalled_s=worker.stalled_s(now_s),
        prefix_hit_rate=worker.num_cached_tokens / worker.num_prompt_tokens
        if worker.num_prompt_tokens
        else 0.0,
    )


def degradation(registry: Registry) -> str | None:
    """Describes one pool standing in for another; None otherwise."""
    num_prefill, num_decode = registry.num_ready(prefills=True), registry.num_ready(prefills=False)
    if num_prefill and num_decode:
        return None
    if num_decode:
        return "no prefill worker is ready: decode workers serve both phases"
    if num_prefill:
        return "no decode worker is ready: prefill workers serve both phases"
    return "no worker is ready"


def snapshot(
    registry: Registry,
    counters: Counters,
    *,
    num_requests: int,
    num_queued: int,
    num_expected: int,
    problems: Iterable[str],
    now_s: float,
) -> RouterStatus:
    return RouterStatus(
        workers=tuple(worker_status(worker, now_s) for worker in sorted(registry, key=lambda w: w.worker_id)),
        num_requests=num_requests,
        num_queued=num_queued,
        num_workers_expected=num_expected,
        counters=replace(counters),
        degraded="; ".join(filter(None, (degradation(registry), *problems))) or None,
    )
