"""The stalls of the head's loop, and of streams with it, while clients send requests designed to stall a
server.

    python -m bench.microbench.stalls   # every hostile request in turn, beside 16 streams
    python -m bench.microbench.stalls --only ids       # those whose name contains "ids"
    python -m bench.microbench.stalls --at-once 4      # four of them at any time

The head runs in a process of its own, with the embedded model's tokenizer and a context of 131,072 tokens; a
worker that computes nothing (`streaming.py`) gives every stream 50 tokens a second. A ticker on the head's
loop is due every 2 ms: what it is late by is how long the loop stood still. Gaps between the tokens of the
streams are seen by a client of them. The first row is a quiet run of the same length in the same processes:
machines that do other things stall, too."""

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import grpc
import httpx
from msgspec import structs

from bench.microbench import streaming
from pdserve.core.config import ClusterConfig
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.app import model_info, serve
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from pdserve.router.core import Router
from pdserve.router.service import RouterService
from tests.gateway.offload.hostile import CONTEXT, GRPC, HTTP, TOOLS

Family = dict[str, Callable[[], tuple[str, bytes]]]
TICK_S = 0.002
QUIET_S = 10.0
STREAM_TOKENS = 4000
TOKENS_PER_S = 50


# the head


class Ticker:
    """The loop's lateness since the last query."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self._due_s = 0.0

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._due_s = loop.time() + TICK_S
        loop.call_at(self._due_s, self._tick)

    def _tick(self) -> None:
        self.worst_s = max(self.worst_s, asyncio.get_running_loop().time() - self._due_s)
        self.start()

    def take(self) -> float:
        worst_s, self.worst_s = self.worst_s, 0.0
        return worst_s


async def head() -> None:
    """Serves until stdin ends; prints its addresses first, then, for each line, the longest stall since the
    last one."""
    config = ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}})
    service = RouterService(Router(), streaming.Observer(), "token")
    port = await service.start("127.0.0.1")
    info = replace(model_info(config), max_model_len=CONTEXT)
    gateway = await serve(streaming.BareFrontend(service), config, Tokenizer.load(MODEL_DIR), info)  # type: ignore[arg-type]
    gateway.offload.start()
    gc.collect()
    gc.freeze()  # as `open_gateway` does
    print(
        json.dumps(
            {
                "worker": port,
                "grpc": gateway.port,
                "http": int((gateway.http_address or "").rpartition(":")[2]),
            }
        ),
        flush=True,
    )
    ticker = Ticker()
    ticker.start()
    while await asyncio.to_thread(sys.stdin.readline):
        print(ticker.take(), flush=True)
    await gateway.stop(0)


def worker(port: int, num_streams: int) -> None:
    """The worker of `streaming.py`, with a longer context."""
    info = structs.replace(streaming._info(), max_model_len=CONTEXT)
    streaming._info = lambda: info
    streaming.TokenSource(port, num_streams * TOKENS_PER_S).run()


# the clients


class Streams:
    """Ordinary streams, begun again when they end, and the longest gap in any of them since the last
    question."""

    def __init__(self, port: int, count: int) -> None:
        self._worst_s = 0.0
        self._lock = threading.Lock()
        self.num_failed = 0
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def take(self) -> float:
        with self._lock:
            worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s

    def _run(self) -> None:
        stub = pdserve_pb2_grpc.GenerationStub(self._channel)
        sampling = pb.SamplingParams(max_tokens=STREAM_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(prompt=pb.Prompt(text="def f(x):"), sampling=sampling)
        while True:
            last_s = None
            try:
                for _ in stub.GenerateStream(request):
                    now_s = time.perf_counter()
                    if last_s is not None:
                        with self._lock:
                            self._worst_s = max(self._worst_s, now_s - last_s)
                    last_s = now_s
            except grpc.RpcError:
                self.num_failed += 1
                time.sleep(0.5)


@dataclass
class Row:
    """One request, or a quiet time."""

    name: str
    answer: str
    took_s: float
    stall_s: float
    gap_s: float


def over_http(port: int, make: Callable[[], tuple[str, bytes]]) -> Callable[[], str]:
    path, body = make()

    def ask() -> str:
        with httpx.Client(trust_env=False, timeout=300) as client:
            url = f"http://127.0.0.1:{port}{path}"
            return str(
                client.post(url, content=body, headers={"content-type": "application/json"}).status_code
            )

    return ask


def over_grpc(port: int, make: Callable[[], tuple[str, bytes]]) -> Callable[[], str]:
    method, data = make()

    def ask() -> str:
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]) as channel:
            try:
                channel.unary_unary(f"/pdserve.v1.Generation/{method}", bytes, bytes)(data, timeout=300)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

    return ask


class Bench:
    """The processes, and what is measured of them."""

    def __init__(self, num_streams: int, at_once: int) -> None:
        self._head = self._start("--head")
        assert self._head.stdout is not None
        self.ports = json.loads(self._head.stdout.readline())
        self._worker = self._start("--worker", str(self.ports["worker"]), "--streams", str(num_streams))
        self._streams = Streams(self.ports["grpc"], num_streams)
        self._at_once = at_once
        time.sleep(5.0)  # until all streams go
        self._streams.num_failed = 0

    @staticmethod
    def _start(*arguments: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "bench.microbench.stalls", *arguments], stdin=pipe, stdout=pipe, text=True
        )

    def measure(self, name: str, ask: Callable[[], str]) -> Row:
        self._stall_s()
        self._streams.take()
        started_s = time.perf_counter()
        with ThreadPoolExecutor(self._at_once) as pool:
            answers = {answer.result() for answer in [pool.submit(ask) for _ in range(self._at_once)]}
        took_s = time.perf_counter() - started_s
        time.sleep(0.2)  # a gap is seen when it is over
        return Row(name, ", ".join(sorted(answers)), took_s, self._stall_s(), self._streams.take())

    def _stall_s(self) -> float:
        assert self._head.stdin is not None and self._head.stdout is not None
        self._head.stdin.write("\n")
        self._head.stdin.flush()
        return float(self._head.stdout.readline())

    def stop(self) -> None:
        assert self._head.stdin is not None
        if self._streams.num_failed:
            print(f"{self._streams.num_failed} streams failed")
        self._head.stdin.close()
        self._head.wait()
        self._worker.wait()


def quiet() -> str:
    time.sleep(QUIET_S)
    return "-"


def _wanted(family: Family, only: str) -> Family:
    """The worker reports no log probabilities."""
    return {name: make for name, make in family.items() if only in name and "log probabilities" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=1, help="number of each request at any time")
    parser.add_argument("--only", default="", help="requests whose name contains this")
    parser.add_argument("--head", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        asyncio.run(head())
        os._exit(0)
    if args.worker:
        worker(args.worker, args.streams)
        return
    http, calls = (_wanted(family, args.only) for family in (HTTP | TOOLS, GRPC))
    bench = Bench(args.streams, args.at_once)
    rows = [bench.measure("quiet", quiet)]
    print(f"{'request':38} {'answer':22} {'took':>8} {'loop':>8} {'gap':>8}  x quiet")
    makes = {f"http: {name}": over_http(bench.ports["http"], make) for name, make in http.items()}
    makes |= {f"grpc: {name}": over_grpc(bench.ports["grpc"], make) for name, make in calls.items()}
    for name, ask in makes.items():
        rows.append(bench.measure(name, ask))
    for row in rows:
        ratio = f"{row.stall_s / rows[0].stall_s:5.1f} {row.gap_s / rows[0].gap_s:5.1f}"
        took = f"{row.took_s:7.2f}s {row.stall_s * 1e3:6.1f}ms {row.gap_s * 1e3:6.1f}ms"
        print(f"{row.name:38} {row.answer[:22]:22} {took}  {ratio}")
    worst = max(rows[1:], key=lambda row: row.stall_s)
    gap_s = max(row.gap_s for row in rows[1:])
    print(f"the longest: loop {worst.stall_s * 1e3:.1f} ms ({worst.name}), streams {gap_s * 1e3:.1f} ms")
    bench.stop()


if __name__ == "__main__":
    main()
