"""The cluster as its status stream reports it, with the time of each message."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import grpc

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

READY = pb.WORKER_STATE_READY


class Watch:
    """Follows WatchStatus on a thread of its own until it is closed, across router restarts, and keeps all
    messages."""

    def __init__(self, stub: rpc.ClusterStub, pools: Mapping[str, int]) -> None:
        self._stub = stub
        self._pools = dict(pools)
        self._heard: list[tuple[float, pb.ClusterStatus]] = []
        self._connected_s: list[float] = []  # the first message of each connection
        self._news = threading.Condition()
        self._closed = threading.Event()
        self._call = self._connect()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        # or the next call, that the thread has just made
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._thread.join()

    def _connect(self) -> "grpc.CallIterator[pb.ClusterStatus]":
        return self._stub.WatchStatus(pb.WatchStatusRequest(), wait_for_ready=True)

    def _follow(self) -> None:
        while not self._closed.is_set():
            with suppress(grpc.RpcError):  # cancelled, or the router is gone
                self._listen()
            self._call = self._connect()
        self._call.cancel()  # type: ignore[no-untyped-call]

    def _listen(self) -> None:
        for number, status in enumerate(self._call):
            with self._news:
                self._heard.append((time.monotonic(), status))
                if not number:
                    self._connected_s.append(self._heard[-1][0])
                self._news.notify_all()

    def wait_for(self, holds: Callable[[pb.ClusterStatus], bool], timeout_s: float) -> pb.ClusterStatus:
        """The next status, from now on, for which `holds` is true. Raises TimeoutError with the last one."""
        start = len(self._heard)
        with self._news:
            if not self._news.wait_for(
                lambda: any(holds(status) for _, status in self._heard[start:]), timeout_s
            ):
                raise TimeoutError(f"after {timeout_s} s:\n{self._heard[-1][1]}")
            return next(status for _, status in self._heard[start:] if holds(status))

    def is_whole(self, status: pb.ClusterStatus) -> bool:
        """Each pool has all its workers, and all are ready."""
        counts = {role: sum(worker.role == role for worker in status.workers) for role in self._pools}
        return counts == self._pools and all(worker.state == READY for worker in status.workers)

    def is_idle(self, status: pb.ClusterStatus) -> bool:
        """Whole, and every block of every worker is free."""
        return self.is_whole(status) and all(
            worker.num_free_blocks == worker.num_blocks and not worker.num_running + worker.num_waiting
            for worker in status.workers
        )

    def ready_workers(self, role: str) -> list[pb.WorkerStatus]:
        """The ready workers of the last message."""
        return [
            worker for worker in self._heard[-1][1].workers if worker.role == role and worker.state == READY
        ]

    def replaced_workers(self) -> dict[int, str]:
        """Process ids and names of workers that were ready once and are not there any more."""
        ready = {
            w.pid: w.worker_id for _, status in list(self._heard) for w in status.workers if w.state == READY
        }
        present = {worker.pid for worker in self._heard[-1][1].workers}
        return {pid: name for pid, name in ready.items() if pid not in present}

    def name_of(self, pid: int) -> str:
        """The worker that had this process; "?" when none was seen with it."""
        workers = (worker for _, status in list(self._heard)[::-1] for worker in status.workers)
        return next((worker.worker_id for worker in workers if worker.pid == pid), "?")

    def first_after(self, at_s: float, holds: Callable[[pb.ClusterStatus], bool]) -> float | None:
        """Seconds from `at_s` to the first message for which `holds` is true; None when there was none."""
        return next(
            (heard_s - at_s for heard_s, status in list(self._heard) if heard_s > at_s and holds(status)),
            None,
        )

    def served_again_after(self, at_s: float) -> float | None:
        """Seconds from `at_s` to the first message of a new connection; None when there was none."""
        return next(
            (connected_s - at_s for connected_s in list(self._connected_s) if connected_s > at_s), None
        )

    def noticed_after(self, at_s: float, worker_id: str, pid: int) -> float | None:
        """Seconds until the status no longer shows this process as ready."""

        def is_gone(status: pb.ClusterStatus) -> bool:
            return not any(
                w.worker_id == worker_id and w.pid == pid and w.state == READY for w in status.workers
            )

        return self.first_after(at_s, is_gone)
