"""The cost of metrics, traces and recent timelines to the router.

    python -m bench.microbench.telemetry

Steps: a decode step, from the worker's bytes into the clients' streams, in turns with a recorder and without;
the gaps between its tokens, which the router counts itself, on their own. Requests: everything recorded of
one when it is over. Scrapes: one exposition. What clients see of it against an earlier revision:
`bench/comparison/against.py`."""

import asyncio
import statistics
import time
from types import SimpleNamespace

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bench.microbench.router import DECODE_APART, LAYOUT, decoding, median_us, request, step, worker
from pdserve.core.codec import FrameDecoder, FrameEncoder
from pdserve.core.held_bytes import HeldBytes
from pdserve.core.histogram import TokenGaps
from pdserve.core.hosts import HostState
from pdserve.core.messages import Leg, LegEnded, Role, StepReport, TokenOutput, TransferStats
from pdserve.core.request import TransferId
from pdserve.router.client_stream import ClientStream
from pdserve.router.core import Router
from pdserve.router.events import Cancel, RequestClosed, RouterEvent, Submit, Timeline, WorkerReady
from pdserve.router.planner_desk import PlannerState
from pdserve.router.service import RouterService
from pdserve.router.stream import ChoiceStream
from pdserve.telemetry.exposition import Exposition, Snapshot
from pdserve.telemetry.otlp import TraceExporter
from pdserve.telemetry.recent import RecentRequests
from pdserve.telemetry.recorder import TelemetryRecorder, Traces
from pdserve.telemetry.request_log import RequestLog
from pdserve.telemetry.steps import StepCosts, StepTally
from pdserve.telemetry.tally import Tally

COSTS = StepCosts(
    flops_per_token=1e8,
    flops_per_sample=1e7,
    flops_per_pair=1e5,
    weight_bytes=1 << 28,
    kv_bytes_per_token=1 << 14,
)
NUM_STEPS = 600


def recorder(traces: Traces | None = None) -> TelemetryRecorder:
    steps, requests = StepTally(), RequestLog(10.0, time.monotonic)
    tally = Tally(steps, ttft_slo_s=0.2, itl_slo_s=0.05)
    return TelemetryRecorder(tally, steps, RecentRequests(), traces, requests, time.monotonic)


class Side:
    """One router process's way of a step: decode the frame, route, fill the streams."""

    def __init__(self, observer: TelemetryRecorder | None, num_sequences: int) -> None:
        self.service = RouterService(Router(DECODE_APART), SimpleNamespace(expects=None), "", observer)
        self.streams = [
            self.service._streams.setdefault(f"r{i}", ClientStream("alice", HeldBytes(1 << 30)))
            for i in range(num_sequences)
        ]
        self.decoder: FrameDecoder[StepReport] = FrameDecoder(StepReport)
        self.times: list[float] = []
        decoding(self.service.handle, num_sequences)

    async def take(self, frame: bytes) -> None:
        start = time.perf_counter()
        for report in self.decoder.feed(frame):
            self.service.handle(report)
        self.times.append(time.perf_counter() - start)
        for stream in self.streams:
            while stream._events:
                await stream.get()

    @property
    def median_us(self) -> float:
        return statistics.median(self.times[NUM_STEPS // 10 :]) * 1e6


async def step_us(num_sequences: int) -> tuple[float, float]:
    """The time of a step without a recorder and with one."""
    sides = Side(None, num_sequences), Side(recorder(), num_sequences)
    encoder = FrameEncoder()
    for index in range(1, NUM_STEPS + 1):
        frame = encoder.encode(step(num_sequences, "decode-0", index))
        for side in sides if index % 2 else reversed(sides):
            await side.take(frame)
    without, observed = sides
    return without.median_us, observed.median_us


def gaps_us(num_sequences: int) -> float:
    """The time of one step: the work of `WorkerReports` for each token, and at the end."""
    gaps = TokenGaps()
    streams = [ChoiceStream(0) for _ in range(num_sequences)]

    def step_through(index: int) -> None:
        now_s = 0.01 * index
        for stream in streams:
            gaps.before.append(stream.last_token_s)
            stream.last_token_s = now_s
        gaps.close(now_s)

    return median_us(step_through, NUM_STEPS)


def closed(telemetry: TelemetryRecorder) -> Timeline:
    """The timeline of a request of 500 prompt tokens from two workers of six."""
    router = Router(DECODE_APART)

    def handle(event: RouterEvent, now_s: float) -> list[RequestClosed]:
        telemetry.observe(event)
        return [command for command in router.handle(event, now_s) if isinstance(command, RequestClosed)]

    for role in (Role.PREFILL, Role.DECODE):
        for i in range(3):
            handle(WorkerReady(worker(f"{role.value}-{i}", role)), 0.0)
    handle(Submit(request("r", tuple(range(500)))), 0.0)
    prefill, decode = "prefill-0", "decode-0"
    handle(
        StepReport(worker_id=prefill, incarnation=1, load=step(0, prefill, 0).load, outputs=(_output(0),)),
        0.1,
    )
    for index in range(1, 20):
        handle(
            StepReport(
                worker_id=decode, incarnation=1, load=step(0, decode, 0).load, outputs=(_output(index),)
            ),
            0.1 + index,
        )
    handle(Cancel("r"), 20.0)
    stats = TransferStats(500 * LAYOUT.bytes_per_token, 30, 0.02, 0.002, 1 << 20)
    handle(
        LegEnded(worker_id=prefill, incarnation=1, transfer=TransferId("r", 0), leg=Leg.PREFILL, stats=stats),
        20.0,
    )
    (end,) = handle(
        LegEnded(
            worker_id=decode, incarnation=1, transfer=TransferId("r", 0), leg=Leg.DECODE, error="aborted"
        ),
        20.0,
    )
    return end.timeline


def _output(index: int) -> TokenOutput:
    return TokenOutput(TransferId("r", 0), 0, index, 7)


def closed_us(traces: Traces | None) -> float:
    telemetry = recorder(traces)
    timeline = closed(telemetry)
    return median_us(lambda i: telemetry.closed(timeline), 2000)


def scrape_us(num_workers: int) -> tuple[float, int]:
    """(one exposition, its bytes)."""
    telemetry, router = recorder(), Router()
    telemetry.closed(closed(telemetry))
    for role in (Role.PREFILL, Role.DECODE):
        for i in range(num_workers // 2):
            router.handle(WorkerReady(worker(f"{role.value}-{i}", role)), 0.0)
    configured = dict.fromkeys((Role.PREFILL, Role.DECODE), num_workers // 2)

    def snapshot() -> Snapshot:
        return Snapshot(
            status=router.status(0.0),
            token_gaps=router.token_gaps,
            configured=configured,
            restarts={},
            hosts={HostState.JOINED: 1},
            planner=PlannerState(),
            num_takeovers=0,
            num_spans=0,
            stall_s=0.0,
            version="",
            model="",
        )

    exposition = Exposition(telemetry.tally, telemetry.steps, COSTS, router.model, snapshot)
    return median_us(lambda i: exposition.render(), 60), len(exposition.render())


async def main() -> None:
    for num_sequences in (1, 8, 32, 256):
        without_us, with_us = await step_us(num_sequences)
        print(
            f"step of {num_sequences:3d} tokens: {without_us:6.1f} us without a recorder, {with_us:6.1f} us"
            f" with: {with_us - without_us:+.1f} us; gaps within: {gaps_us(num_sequences):.1f} us"
        )
    print(f"request recorded at its end: {closed_us(None):.0f} us")
    exporter = TraceExporter("", "", InMemorySpanExporter())
    print(f"  and exported as a trace: {closed_us(exporter):.0f} us")
    exporter.close()
    for num_workers in (2, 100, 1000):
        us, num_bytes = scrape_us(num_workers)
        print(f"scrape with {num_workers:4d} workers: {us / 1e3:.1f} ms, {num_bytes / 1e3:.0f} kB")


if __name__ == "__main__":
    asyncio.run(main())
