"""The head's CPU time for those who watch its status: one server, and up to a hundred watchers.

    python -m bench.microbench.status_watchers [--workers 1000] [--watchers 1 10 100] [--updates 25]

Router and fleet are real, with that many workers, and so are the feed and the gRPC server. The status changes
all the time, so it is sent as often as it may be. The watchers read raw bytes, in another process."""

import argparse
import asyncio
import json
import resource
import sys
from collections.abc import AsyncGenerator

import grpc

from bench.microbench.fleet_growth import fleet_of, started_fleet
from pdserve.core.config import ClusterConfig
from pdserve.core.status import ClusterStatus, WorkerState, WorkerStatus
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.app import model_info, serve
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.head.status_feed import StatusFeed
from pdserve.proto import pdserve_pb2 as pb
from pdserve.router.config import RouterConfig

METHOD = "/pdserve.v1.Cluster/WatchStatus"


class WatchedCluster:
    """Answers as the head does, as far as watchers ask."""

    def __init__(self, num_workers: int) -> None:
        self._router = fleet_of(num_workers, RouterConfig())
        self._fleet = started_fleet(num_workers)
        self.num_updates = self.num_watchers = 0
        self.has_changed = asyncio.Event()  # the number of watchers
        self.feed = StatusFeed(self.status)

    def status(self) -> ClusterStatus:
        self.num_updates += 1
        now_s = asyncio.get_running_loop().time()
        routed = self._router.status(now_s)
        rows = zip(self._fleet.status(), routed.workers, strict=True)
        return ClusterStatus(
            serving=True,
            shutting_down=False,
            num_queued_requests=routed.num_queued,
            num_running_requests=routed.num_requests,
            instances={},
            workers=tuple(
                WorkerStatus(
                    worker_id=member.worker_id,
                    role=member.role,
                    state=WorkerState.READY,
                    node="10.0.0.1",
                    pid=12345,
                    devices=("cuda:0",),
                    kernels="triton",
                    num_running=row.load.num_running,
                    num_free_blocks=row.load.num_free_blocks,
                    num_blocks=row.num_blocks,
                    tokens_per_s=row.tokens_per_s,
                    age_s=now_s,
                )
                for member, row in rows
            ),
            uptime_s=now_s,
        )

    async def watch(self) -> AsyncGenerator[ClusterStatus, None]:
        self.num_watchers += 1
        self.has_changed.set()
        try:
            async for status in self.feed.watch():
                yield status
        finally:
            self.num_watchers -= 1
            self.has_changed.set()


async def watch_many(port: int, num_watchers: int) -> None:
    """The watchers' process, until it is killed."""
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        watching = channel.unary_stream(METHOD, None, None)

        async def watch() -> None:
            async for _ in watching(pb.WatchStatusRequest().SerializeToString()):
                pass

        await asyncio.gather(*(watch() for _ in range(num_watchers)))


async def measure(num_workers: int, watchers: list[int], num_updates: int) -> None:
    listen = {"grpc": "127.0.0.1:0", "http": None, "admin_without_key": True}
    config = ClusterConfig.model_validate({"listen": listen})
    cluster = WatchedCluster(num_workers)
    gateway = await serve(cluster, config, Tokenizer.load(MODEL_DIR), model_info(config))  # type: ignore[arg-type]
    for num_watchers in watchers:
        arguments = ["--watch", json.dumps([gateway.port, num_watchers])]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.microbench.status_watchers", *arguments
        )
        while cluster.num_watchers != num_watchers:
            await cluster.has_changed.wait()
            cluster.has_changed.clear()
        while cluster.num_updates < 5:
            await change(cluster)
        first, before_s = cluster.num_updates, cpu_s()
        while cluster.num_updates < first + num_updates:
            await change(cluster)
        used_ms = (cpu_s() - before_s) * 1e3 / (cluster.num_updates - first)
        print(
            f"{num_workers} workers, {num_watchers:3} watchers: {used_ms:6.1f} ms CPU an update", flush=True
        )
        process.kill()
        await process.wait()
    await gateway.stop(0.0)


async def change(cluster: WatchedCluster) -> None:
    cluster.feed.change()
    await asyncio.sleep(0.02)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--watchers", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--updates", type=int, default=25)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        asyncio.run(watch_many(*json.loads(args.watch)))
        return
    asyncio.run(measure(args.workers, args.watchers, args.updates))


if __name__ == "__main__":
    main()
