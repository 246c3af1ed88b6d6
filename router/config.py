"""The router's settings. `slo` and `limits` of cluster.yaml end up here; they may change while requests
run."""

from dataclasses import dataclass

from ..core.config import ClusterConfig

PREFILL_ON_DECODE_FACTOR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Limits of the queue, and the parameters of placement."""

    max_queued_requests: int = 1024
    # choices of one client that workers hold at a time; None: as many as there is room for
    max_running_per_client: int | None = None
    # of one stream; beyond that, the stream leaves its workers until its client has read half of them
    max_unread_tokens: int = 1024
    max_unread_bytes: int = 256 << 20  # of all streams together
    itl_slo_s: float = 0.05  # placement avoids workers whose predicted time per token is longer
    enforces_itl: bool = False  # a request for which every worker would exceed it is refused
    max_wait_for_worker_s: float = 300.0  # while no ready worker can serve a request at all
    max_attempts: int = 5  # dispatches of a choice before its request ends with an error
    max_prefill_backlog_tokens: int | None = None  # per worker; None: twice its max_batch_tokens
    # weight of prefill seconds on a decode worker; None: never prefill there
    prefill_on_decode_factor: float | None = PREFILL_ON_DECODE_FACTOR
    # least loaded workers a decision looks at, per role, beside those that hold the prefix
    num_candidates: int = 3
    retry_delay_s: float = 0.02  # before the second retry after workers' errors; quadruples each time
    max_retry_delay_s: float = 1.0
    claim_timeout_s: float = 30.0  # how long a request of an earlier router waits for its client to come back
    take_over_tokens: int = 4096  # replayed in one turn of the loop: some milliseconds

    @classmethod
    def of(cls, config: ClusterConfig) -> "RouterConfig":
        limits = config.limits
        never = config.routing.prefill_on_decode == "never"
        return cls(
            max_queued_requests=limits.max_queued_requests,
            max_running_per_client=limits.max_running_per_client,
            max_unread_tokens=limits.max_unread_tokens,
            max_unread_bytes=limits.max_held_bytes // 2,
            itl_slo_s=config.slo.itl_ms / 1e3,
            enforces_itl=config.slo.enforce,
            max_wait_for_worker_s=limits.max_wait_for_worker_s,
            prefill_on_decode_factor=None if never else PREFILL_ON_DECODE_FACTOR,
        )
