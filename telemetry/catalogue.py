"""Every metric: its name, type, labels and meaning. docs/operations.md has the same table, dashboards use
these names.

Names are vLLM's where the meaning is the same. All have the prefix `pdserve_`; counters end in `_total`.
"""

from dataclasses import dataclass
from typing import Literal

from ..core.histogram import RATIOS, TOKEN_GAPS_S

PREFIX = "pdserve_"

REQUEST_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.2,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
SHORT_S = (
    1e-4,
    2.5e-4,
    5e-4,
    1e-3,
    1.5e-3,
    2.5e-3,
    5e-3,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
SIZES = tuple(float(1 << power) for power in range(14, 36, 2))  # 16 KiB to 16 GiB
NUM_TOKENS = tuple(float(1 << power) for power in range(18))


@dataclass(frozen=True, slots=True)
class Metric:
    """One name. `bounds` are a histogram's."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, "gauge", meaning, labels)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, "counter", meaning, labels)


def _histogram(name: str, bounds: tuple[float, ...], meaning: str, *labels: str) -> Metric:
    return Metric(name, "histogram", meaning, labels, bounds)


GAUGES = (
    _gauge("info", "Always 1; the labels tell the version and the model that is served.", "version", "model"),
    _gauge("num_requests_running", "Sequences that take part in the worker's steps.", "pool", "worker"),
    _gauge(
        "num_requests_waiting",
        "Sequences at the worker that wait for blocks, for KV or for a step.",
        "pool",
        "worker",
    ),
    _gauge("kv_cache_usage_perc", "Share of the worker's KV blocks in use, 0 to 1.", "pool", "worker"),
    _gauge("worker_restarts", "How often the worker has been replaced after a failure.", "pool", "worker"),
    _gauge("workers_ready", "Workers that take work.", "pool"),
    _gauge("workers_configured", "Workers that the configuration asks for.", "pool"),
    _gauge("hosts", "Hosts by their state: joined, awaited, checking, refused, lost or leaving.", "state"),
    _gauge("num_requests_queued", "Requests that wait for workers, in the router."),
    _gauge("num_requests_live", "Requests that were admitted and have not ended."),
    _gauge("slo_ttft_seconds", "The objective `slo.ttft_ms` in force."),
    _gauge("slo_itl_seconds", "The objective `slo.itl_ms` in force."),
    _gauge(
        "planner_trust",
        "The share of the planner's predictions of goodput that it trusts, 0 to 1: less after those that were"
        " wrong. 0 while it is off.",
    ),
    _gauge(
        "planner_predicted_goodput",
        "Requests per second within the objectives that the planner's latest decision predicts for the ratio"
        " in force. 0 without one.",
    ),
    _gauge(
        "head_stall_seconds",
        "The longest that all streams and heartbeats of the head waited for it, in the last minute or two.",
    ),
    _gauge(
        "rank_cpu_seconds",
        "Processor time of a worker's process since its start; of each of its ranks where it has several.",
        *("pool", "worker", "rank"),
    ),
)
COUNTERS = (
    _counter("requests_admitted_total", "Requests that the router took."),
    _counter("requests_rejected_total", "Requests refused because the queue was full."),
    _counter(
        "request_success_total",
        "Requests that ended, by how; only stop and length are answers.",
        "finished_reason",
    ),
    _counter(
        "slo_requests_total",
        "Requests that ended, by whether they kept the objectives for the first token and the mean gap"
        " between tokens; goodput is met, met. Those that their clients cancelled or left unread, or that"
        " could not be carried out by anybody, are not judged; errors and deadlines miss both.",
        "ttft",
        "itl",
    ),
    _counter("prompt_tokens_total", "Prompt tokens of requests that got their first token."),
    _counter("generation_tokens_total", "Output tokens forwarded to clients."),
    _counter(
        "prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache of the worker that prefilled.",
        "pool",
    ),
    _counter("prefix_cache_hits_total", "Those of them that were cached.", "pool"),
    _counter(
        "num_preemptions_total", "Sequences put back because blocks ran out, to be computed again.", "pool"
    ),
    _counter("dispatches_total", "Pieces of work given to workers: one a request when nothing fails."),
    _counter(
        "dispatches_on_one_worker_total", "Those of them whose prefill and decode were given to one worker."
    ),
    _counter(
        "dispatches_beyond_itl_total",
        "Those of them that no worker with room was predicted to serve within the SLO between tokens.",
    ),
    _counter("dispatches_retried_total", "Dispatches that failed and were repeated."),
    _counter("dispatches_displaced_total", "Dispatches taken back to make room for clients that ran little."),
    _counter(
        "streams_resumed_total", "Streams that went on at another attempt, behind the tokens that were sent."
    ),
    _counter("streams_paused_total", "Streams taken from their workers because their clients did not read."),
    _counter("requests_expired_total", "Requests whose deadline passed, or could not be met any more."),
    _counter("requests_hopeless_total", "Those of them that ended before they cost a prefill."),
    _counter("stale_messages_total", "Messages of lost workers, dropped."),
    _counter(
        "planner_changes_total", "Changes of the ratio that the planner has made since the head's start."
    ),
    _counter(
        "router_takeovers_total",
        "Heads that took over the workers of one that died, in the life of the cluster.",
    ),
    _counter("estimated_flops_total", "Arithmetic of all steps, counted from their shapes.", "pool", "phase"),
    _counter(
        "estimated_read_bytes_total",
        "Memory that steps read, counted from their shapes: all weights once a step, and the KV of decoding"
        " sequences.",
        "pool",
        "phase",
    ),
    _counter(
        "estimated_write_bytes_total",
        "Memory that steps wrote, counted from their shapes: new KV.",
        "pool",
        "phase",
    ),
    _counter("trace_spans_total", "Spans handed to the exporter of traces."),
)
HISTOGRAMS = (
    _histogram(
        "time_to_first_token_seconds",
        REQUEST_S,
        "From admission to the first token, as the router forwards it.",
    ),
    _histogram(
        "inter_token_latency_seconds",
        TOKEN_GAPS_S,
        "Between two tokens of a choice, as the router forwards them.",
    ),
    _histogram(
        "request_time_per_output_token_seconds", TOKEN_GAPS_S, "Mean gap between the tokens of a request."
    ),
    _histogram("e2e_request_latency_seconds", REQUEST_S, "From admission to the end of an answer."),
    _histogram(
        "request_queue_time_seconds", REQUEST_S, "Of TTFT: until the dispatch that brought the first token."
    ),
    _histogram(
        "request_worker_queue_time_seconds",
        REQUEST_S,
        "Of TTFT: at the prefill worker, until its first step.",
        "pool",
    ),
    _histogram("request_prefill_time_seconds", REQUEST_S, "Of TTFT: computing the prompt.", "pool"),
    _histogram(
        "request_overhead_time_seconds", SHORT_S, "The rest of TTFT: messages, and the router itself."
    ),
    _histogram(
        "request_kv_wait_time_seconds",
        SHORT_S,
        "From the first token until the decode worker had the KV: the second token waits for it, the first"
        " does not.",
    ),
    _histogram("request_decode_time_seconds", REQUEST_S, "From the first token to the end of an answer."),
    _histogram("request_prompt_tokens", NUM_TOKENS, "Prompt tokens of requests that were answered."),
    _histogram(
        "request_generation_tokens",
        NUM_TOKENS,
        "Output tokens of requests that were answered, all choices together.",
    ),
    _histogram("kv_transfer_bytes", SIZES, "Of one transfer between workers."),
    _histogram(
        "kv_transfer_seconds", SHORT_S, "Of one transfer, from the first chunk gathered to the commit."
    ),
    _histogram(
        "kv_transfer_exposed_seconds", SHORT_S, "The part of it that was not hidden behind the prefill."
    ),
    _histogram(
        "step_duration_seconds",
        TOKEN_GAPS_S,
        "Of one step; phase is prefill, decode or mixed.",
        "pool",
        "phase",
    ),
    _histogram(
        "prediction_ratio",
        RATIOS,
        "Measured over predicted time, by what was predicted: prefill_step, decode_step, transfer (what is"
        " left of it after the prefill), ttft (from dispatch) or itl (mean gap).",
        "of",
    ),
)
_GPU = ("node", "index", "gpu")  # the index on its node, and the UUID
GPU_GAUGES = (
    _gauge(
        "gpu_info",
        "Always 1; tells which GPU (its index on the node, its UUID, its name) a worker computes on.",
        *("pool", "worker", *_GPU, "name"),
    ),
    _gauge("gpu_memory_used_bytes", "Memory in use on the GPU, whoever uses it.", *_GPU),
    _gauge("gpu_memory_total_bytes", "Memory of the GPU.", *_GPU),
    _gauge("gpu_power_watts", "What the GPU draws.", *_GPU),
    _gauge("gpu_power_limit_watts", "What it may draw.", *_GPU),
    _gauge("gpu_temperature_celsius", "Of the GPU's chip.", *_GPU),
    _gauge("gpu_sm_clock_hertz", "Clock of its processors.", *_GPU),
    _gauge("gpu_memory_clock_hertz", "Clock of its memory.", *_GPU),
    _gauge(
        "gpu_pcie_transmit_bytes_per_second",
        "What the GPU sends over PCIe, in 20 ms before it was asked.",
        *_GPU,
    ),
    _gauge(
        "gpu_pcie_receive_bytes_per_second",
        "What it receives over PCIe, in 20 ms before it was asked.",
        *_GPU,
    ),
    _gauge(
        "gpu_throttled",
        "Whether the GPU runs below its clocks, by reason: power (its limit), temperature, or hardware (a"
        " brake of the board).",
        *_GPU,
        "reason",
    ),
    _gauge(
        "gpu_peak_flops_per_second",
        "What the worker's GPU can compute at most, of bfloat16 products, dense; there only for GPUs of which"
        " it is known.",
        *("pool", "worker"),
    ),
    _gauge(
        "gpu_peak_bytes_per_second",
        "What the worker's GPU can read from its memory at most; there only for GPUs of which it is known.",
        *("pool", "worker"),
    ),
)
GPU_COUNTERS = (
    _counter(
        "gpu_nvlink_transmit_bytes_total",
        "Sent over all NVLinks of the GPU since its driver was loaded.",
        *_GPU,
    ),
    _counter(
        "gpu_nvlink_receive_bytes_total",
        "Received over all NVLinks of the GPU since its driver was loaded.",
        *_GPU,
    ),
)
CATALOGUE = (*GAUGES, *GPU_GAUGES, *COUNTERS, *GPU_COUNTERS, *HISTOGRAMS)
