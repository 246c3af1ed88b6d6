"""The streaming throughput of the gRPC and HTTP servers: one head process on one core, 256 streams, a worker
that computes nothing.

    python -m bench.microbench.streaming [grpc|http ...] [--streams 256] [--tokens 400] [--rate TOKENS_PER_S]
    [--at-once N] [--profile FILE]

The head has the real router, its control connection and both servers. The worker speaks the control protocol
and produces a token for every stream in each step: as fast as the head takes them, or at `--rate`. Clients
write and read raw bytes, so that they cost little: HTTP/1.1, and HTTP/2 with gRPC's framing. The head runs on
the first core, worker and clients on the second.

Two rounds for each server. In the first, calls start while the worker already produces tokens for those that
have; in the second it waits until all have started, so that starts and streams are measured one by one. Then
the floor: grpc.aio alone sends as many messages of that size (`grpc_floor`)."""

import argparse
import asyncio
import cProfile
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import deque

from bench.microbench import grpc_floor
from bench.microbench.stream_clients import PROMPT_TOKENS, Count, over_grpc, over_http
from pdserve.core.config import ClusterConfig
from pdserve.core.messages import (
    Abort,
    Hello,
    KVLayout,
    Leg,
    LegEnded,
    Prefill,
    Ready,
    Role,
    Serve,
    StepReport,
    StepTiming,
    TokenOutput,
    TransferAddress,
    WorkerCommand,
    WorkerInfo,
    WorkerLoad,
)
from pdserve.core.request import FinishReason, TransferId
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.app import model_info, serve
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.proto import pdserve_pb2 as pb
from pdserve.router import client_stream
from pdserve.router.core import Router
from pdserve.router.service import RouterService
from pdserve.worker.router_link import RouterLink

HEAD_CORE, OTHER_CORE = 0, -1
CONTINUATION = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
)


# the head


class Observer:
    """Waits for the one worker."""

    def expects(self, key: tuple[str, int]) -> bool:
        return True

    def handle(self, event: object) -> None: ...


class BareFrontend:
    """Only requests."""

    def __init__(self, service: RouterService) -> None:
        self.generate = service.generate
        self.cancel = service.cancel


async def head(profile: str | None) -> None:
    """Serves until stdin ends; prints its addresses first, then its CPU seconds for each line it reads."""
    config = ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}})
    service = RouterService(Router(), Observer(), "token")
    port = await service.start("127.0.0.1")
    servers = await serve(BareFrontend(service), config, Tokenizer.load(MODEL_DIR), model_info(config))  # type: ignore[arg-type]
    print(
        json.dumps(
            {
                "worker": port,
                "grpc": servers.port,
                "http": int((servers.http_address or "").rpartition(":")[2]),
            }
        ),
        flush=True,
    )
    profiler = cProfile.Profile() if profile else None
    if profiler:
        profiler.enable()
    while await asyncio.to_thread(sys.stdin.readline):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime, flush=True)
    if profiler:
        profiler.disable()
        profiler.dump_stats(profile or "")
    os._exit(0)


# the worker


class TokenSource:
    """A token for every stream in each step."""

    def __init__(self, port: int, rate: float | None) -> None:
        self._num_awaited = 1  # streams that are to be there before the first step for any
        self._announces = True  # the next first step
        self._rate = rate
        self._token_ids = Tokenizer.load(MODEL_DIR).encode(CONTINUATION, add_special_tokens=False)
        self._next: dict[
            TransferId, tuple[int, int]
        ] = {}  # index of the next token, how many there are to be
        self._inbox: deque[WorkerCommand] = deque()
        self._lost = threading.Event()
        hello = Hello(worker_id="both-0", incarnation=1)
        self._link = RouterLink(
            ("127.0.0.1", port), "token", hello, self._inbox.append, lambda link: self._lost.set()
        )
        self._link.start()
        self._link.send(Ready(info=_info()))

    def _take(self, command: WorkerCommand) -> None:
        match command:
            case Serve(spec=spec) | Prefill(spec=spec):
                self._next[spec.transfer] = len(spec.output_token_ids), spec.sampling.max_tokens
            case Abort(transfer=transfer):
                self._next.pop(transfer, None)
                self._link.send(_ended(transfer, "aborted"))

    def run(self) -> None:
        """Runs until the head closes the connection."""
        started_s, num_sent = time.perf_counter(), 0
        while not self._lost.is_set():
            while self._inbox:
                self._take(self._inbox.popleft())
            if not num_sent and len(self._next) < self._num_awaited:
                time.sleep(0.001)
                continue
            if not num_sent:
                started_s = time.perf_counter()
                if self._announces:
                    self._num_awaited, self._announces = 1, False
                    print(flush=True)
            elif self._rate:
                time.sleep(max(0.0, started_s + num_sent / self._rate - time.perf_counter()))
            num_sent = num_sent + self._step() if self._next else 0

    def obey(self) -> None:
        """Reads how many streams to await, line by line; each is answered by one when the first step is
        made."""
        for line in sys.stdin:
            self._num_awaited, self._announces = int(line), True

    def _step(self) -> int:
        outputs, ended = [], []
        for transfer, (index, count) in self._next.items():
            reason = FinishReason.LENGTH if index + 1 == count else None
            outputs.append(
                TokenOutput(transfer, 0, index, self._token_ids[index % len(self._token_ids)], reason)
            )
            self._next[transfer] = index + 1, count
            if reason:
                ended.append(transfer)
        load = WorkerLoad(num_running=len(outputs), num_free_blocks=100_000)
        timing = StepTiming(
            num_prefill_tokens=0,
            sum_prefill_squares=0,
            num_decode_sequences=len(outputs),
            num_context_tokens=len(outputs),
            duration_s=0.01,
        )
        report = StepReport(
            worker_id="both-0", incarnation=1, load=load, outputs=tuple(outputs), timing=timing
        )
        for transfer in ended:
            del self._next[transfer]
        if outputs:
            self._link.send(report, *map(_ended, ended))
        return len(outputs)


def _ended(transfer: TransferId, error: str | None = None) -> LegEnded:
    return LegEnded(worker_id="both-0", incarnation=1, transfer=transfer, leg=Leg.DECODE, error=error)


def _info() -> WorkerInfo:
    return WorkerInfo(
        worker_id="both-0",
        incarnation=1,
        role=Role.BOTH,
        layout=KVLayout(
            num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=16, model_fingerprint="m"
        ),
        num_blocks=1_000_000,
        max_model_len=32_768,
        max_batch_tokens=1 << 20,
        max_batch_size=4096,
        address=TransferAddress(
            worker_id="both-0", incarnation=1, host_id="h", unix_path="", tcp_host="", tcp_port=0
        ),
        devices=("cpu:1",),
        node="n",
        pid=1,
        kernels="none",
    )


# the measurement


def clients(
    server: str, num_streams: int, num_tokens: int, ports: dict[str, int], count: Count
) -> list[asyncio.Task[None]]:
    if server == "grpc":
        sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        prompt = pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT_TOKENS))
        requests = [pb.GenerateRequest(prompt=prompt, sampling=sampling) for _ in range(num_streams)]
        return [asyncio.create_task(over_grpc(requests, ports["grpc"], count))]
    return [asyncio.create_task(over_http(num_tokens, ports["http"], count)) for _ in range(num_streams)]


def _start(*arguments: str) -> "subprocess.Popen[str]":
    """Starts this file in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.microbench.streaming", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Measurement:
    """A head and a worker, each on its core, and the time that the head takes."""

    def __init__(self, args: argparse.Namespace) -> None:
        profile = ["--profile", args.profile] if args.profile else []
        self._head = _start("--head", "--at-once", str(args.at_once), *profile)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self._head.pid, {cores[HEAD_CORE]})
        self.ports: dict[str, int] = json.loads(_line(self._head))
        rate = ["--rate", str(args.rate)] if args.rate else []
        self._worker = _start("--worker", str(self.ports["worker"]), *rate)
        for pid in (0, self._worker.pid):
            os.sched_setaffinity(pid, {cores[OTHER_CORE]})

    def used(self) -> tuple[float, float]:
        """Returns the head's CPU seconds, and the time."""
        _say(self._head, "")
        return float(_line(self._head)), time.perf_counter()

    def await_streams(self, num_streams: int) -> None:
        """Has the worker wait for that many before it begins."""
        _say(self._worker, str(num_streams))

    async def begun(self) -> None:
        """Returns when the worker begins."""
        await asyncio.to_thread(_line, self._worker)

    def close(self) -> None:
        assert self._head.stdin
        self._head.stdin.close()
        self._head.wait()
        self._worker.wait()


async def measure(server: str, args: argparse.Namespace) -> None:
    cores = os.sched_getaffinity(0)
    measurement = Measurement(args)
    await _until_ready(measurement.ports["http"])
    await measurement.begun()
    for num_tokens, num_awaited in ((20, 1), (args.tokens, 1), (args.tokens, args.streams)):
        measurement.await_streams(num_awaited)
        before = measurement.used()
        count = Count()
        streams = asyncio.gather(*clients(server, args.streams, num_tokens, measurement.ports, count))
        await measurement.begun()
        begun = measurement.used()
        await streams
        ended = measurement.used()
        if num_awaited > 1:
            print(
                f"{server}, a call's start: {(begun[0] - before[0]) / args.streams * 1e6:5.0f} us CPU,"
                f" {args.streams / (begun[1] - before[1]):6,.0f} a second"
            )
        if num_tokens == args.tokens:
            since, what = (before, "with the starts") if num_awaited == 1 else (begun, "streams alone")
            print(f"{server}, {what}: {_rate(since, ended, args.streams * num_tokens, count)}", flush=True)
    measurement.close()
    os.sched_setaffinity(0, cores)
    if server == "grpc":
        num_events = max(args.streams, count.num_events)
        size = max(1, round(args.streams * args.tokens / num_events))
        cost = await asyncio.to_thread(
            grpc_floor.measure, "write", args.streams, num_events // args.streams, size
        )
        print(
            f"grpc.aio alone: a call's start {cost.start_us:5.0f} us CPU, a message of {size} tokens"
            f" {cost.message_us:5.1f} us, {cost.message_us / size:5.1f} us a token"
        )


def _rate(since: tuple[float, float], until: tuple[float, float], num_tokens: int, count: Count) -> str:
    used_s, wall_s = until[0] - since[0], until[1] - since[1]
    return (
        f"{num_tokens / wall_s:8,.0f} tokens/s, head {used_s / num_tokens * 1e6:5.1f} us CPU a "
        f"token ({used_s / wall_s:4.0%} of a core), "
        f"{num_tokens / max(1, count.num_events):.2f} tokens an event"
    )


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


def _say(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


async def _until_ready(port: int) -> None:
    """Returns when the head accepts requests."""
    count = Count()
    while not count.num_events:
        await over_http(1, port, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("servers", nargs="*", default=["grpc", "http"])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float)
    parser.add_argument(
        "--at-once", type=int, default=client_stream.MAX_TOKENS_AT_ONCE, help="tokens an event, at most"
    )
    parser.add_argument("--profile")
    parser.add_argument("--head", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        client_stream.MAX_TOKENS_AT_ONCE = args.at_once
        asyncio.run(head(args.profile))
        return
    if args.worker:
        source = TokenSource(args.worker, args.rate)
        threading.Thread(target=source.obey, daemon=True).start()
        source.run()
        return
    for server in args.servers:
        asyncio.run(measure(server, args))


if __name__ == "__main__":
    main()
