"""A launched cluster and its gRPC stubs, with the tests' common operations."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import yaml

from pdserve.cluster.launch import LaunchedCluster, launch
from pdserve.cluster.ray_folder import session_folder
from pdserve.core.config import ClusterConfig
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

READY = pb.WORKER_STATE_READY
ADMIN_WITH_KEY = {"grpc": "127.0.0.1:0", "http": None}  # or, as the cluster's user, by its socket
LISTEN = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0", "admin_without_key": True}

# an environment variable that every process of this test session inherits
SESSION_MARK = "PDSERVE_TEST_SESSION"


def session_processes() -> dict[int, str]:
    """Returns the other descendants of this test session, with their commands."""
    mark = f"{SESSION_MARK}={os.environ[SESSION_MARK]}".encode()
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or not ours
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = command.decode(errors="replace")[:100]
    return found


def process_of(actor: str) -> int:
    """Returns the process of the only actor of this class."""
    (found,) = (pid for pid, command in session_processes().items() if actor in command)
    return found


class Cluster:
    """A cluster, started on construction; `close` checks that it leaves nothing behind. Tests get theirs from
    `Clusters`."""

    def __init__(
        self, path: str | Path, prefill: int = 1, decode: int = 1, max_batch_size: int = 64, **settings: Any
    ) -> None:
        self.settings: dict[str, Any] = {
            "model": {"path": str(path), "max_model_len": 2048},
            "pools": {
                "prefill": {
                    "instances": prefill,
                    "cpus_per_instance": 0.5,
                    "kv_cache_bytes": 64 << 20,
                    "max_batch_size": max_batch_size,
                },
                "decode": {
                    "instances": decode,
                    "cpus_per_instance": 0.5,
                    "kv_cache_bytes": 64 << 20,
                    "max_batch_size": max_batch_size,
                },
            },
            "routing": {"prefill_on_decode": "never"},
            "listen": LISTEN,
            "drain_timeout_s": 60.0,
        } | settings
        self._launched: LaunchedCluster = launch(ClusterConfig.model_validate(self.settings))
        self.address = self._launched.grpc_address
        # a window that stays small: a large stream runs until it is read
        self.channel = grpc.insecure_channel(self.address, [("grpc.http2.bdp_probe", 0)])
        self.generation = rpc.GenerationStub(self.channel)
        self._local = grpc.insecure_channel(self._launched.local_address)
        self.admin = rpc.ClusterStub(self._local)
        try:
            self.wait_for(prefill=prefill, decode=decode)
        except BaseException:  # Ray has room for one cluster at a time
            self.end()
            raise

    def wait_for(self, **ready: int) -> pb.ClusterStatus:
        """Waits until the pools have exactly these numbers of ready workers and no others."""
        for status in self.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
            counts = {role: sum(w.role == role for w in status.workers) for role in ready}
            if counts == ready and all(worker.state == READY for worker in status.workers):
                return status
        raise AssertionError("the status stream ended")

    def apply(self, **instances: int) -> list[pb.ConfigChange]:
        """Changes the pools' sizes; returns the cluster's answer."""
        for pool, count in instances.items():
            self.settings["pools"][pool]["instances"] = count
        text = yaml.safe_dump({"metadata": {"pdserve": self.settings}})
        return list(self.admin.Apply(pb.ApplyRequest(config_yaml=text)).changes)

    def resize(self, **instances: int) -> pb.ClusterStatus:
        """Gives the pools these sizes, and waits for them."""
        self.apply(**instances)
        return self.wait_for(**instances)

    def status(self) -> pb.ClusterStatus:
        return self.admin.GetStatus(pb.GetStatusRequest(), wait_for_ready=True, timeout=240)

    def workers(self, role: str) -> list[pb.WorkerStatus]:
        """Returns a pool's workers; their numbers depend on which were added and removed before."""
        return [worker for worker in self.status().workers if worker.role == role]

    def pids(self) -> dict[str, int]:
        """Returns the workers' processes, by worker, even if the head dies meanwhile."""
        return {worker.worker_id: worker.pid for worker in self.status().workers}

    def request(self, prompt: Sequence[int] | str, salt: str = "", **sampling: Any) -> pb.GenerateRequest:
        kind = {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}
        options = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | sampling
        return pb.GenerateRequest(
            prompt=pb.Prompt(**kind), sampling=pb.SamplingParams(**options), cache_salt=salt
        )

    def stream(self, request: pb.GenerateRequest) -> list[pb.GenerateEvent]:
        return list(self.generation.GenerateStream(request, timeout=120))

    def generate_all(self, requests: Iterable[pb.GenerateRequest]) -> list[list[pb.GenerateEvent]]:
        """Runs all requests at once; returns each stream's events."""
        with ThreadPoolExecutor(max_workers=32) as pool:
            return list(pool.map(self.stream, requests))

    def check_all_blocks_free(self) -> None:
        """Waits until every worker has reported, within a few heartbeats, that it holds nothing any more."""
        for status in self.admin.WatchStatus(pb.WatchStatusRequest(), timeout=240):
            if all(
                w.num_free_blocks == w.num_blocks and not w.num_running + w.num_waiting
                for w in status.workers
            ):
                return
        raise AssertionError("the status stream ended")

    def close(self) -> None:
        try:
            self.check_all_blocks_free()
            num_sockets = len(list(session_folder().glob("kv-*/*")))
            assert num_sockets >= len(self.pids()), "workers' sockets lie in Ray's folder, and go with it"
        finally:
            self.end()

    def abandon(self) -> None:
        self.channel.close()
        self._local.close()
        self._launched.abandon()

    def end(self) -> None:
        self.channel.close()
        self._local.close()
        self._launched.stop()


class Clusters:
    """The cluster that runs in this session's Ray, which has room for one. It is kept for whoever asks next for
    the same settings, as a launch costs seconds of several processes."""

    def __init__(self) -> None:
        self._asked: tuple[str, dict[str, Any]] | None = None
        self._running: Cluster | None = None

    def get(
        self, path: str | Path = "embedded", prefill: int = 1, decode: int = 1, **settings: Any
    ) -> Cluster:
        """Returns a cluster with these settings and numbers of ready workers, which may have served others."""
        running = self._running
        if running is None or self._asked != (str(path), settings):
            self.end()
            self._running = running = Cluster(path, prefill, decode, **settings)
            self._asked = str(path), settings
            return running
        try:
            running.resize(prefill=prefill, decode=decode)
        except BaseException:  # whoever asks next gets another one
            self._running = None
            running.end()
            raise
        return running

    def take(self, **settings: Any) -> Cluster:
        """Returns a cluster that the caller ends."""
        cluster = self.get(**settings)
        self._running = None
        return cluster

    def end(self) -> None:
        """Makes room for a cluster that a test launches itself."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


def tokens_of(events: Iterable[pb.GenerateEvent], choice: int = 0) -> list[int]:
    """Returns the choice's tokens; checks that indices are contiguous, with exactly one ending after them and
    one of the request."""
    tokens: list[int] = []
    ended = False
    events = list(events)
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "tokens" and event.tokens.choice == choice:
            assert not ended
            assert event.tokens.index == len(tokens)
            tokens += event.tokens.token_ids
        elif kind == "choice_end" and event.choice_end.choice == choice:
            assert not ended
            ended = True
    assert ended
    assert [event.WhichOneof("event") for event in events].count("end") == 1
    assert events[-1].WhichOneof("event") == "end"
    return tokens


def text_of(events: Iterable[pb.GenerateEvent], choice: int = 0) -> str:
    return "".join(
        event.tokens.text for event in events if event.HasField("tokens") and event.tokens.choice == choice
    )


def workers_of(events: list[pb.GenerateEvent]) -> tuple[str, str]:
    """Returns the prefill and decode workers of the timeline's last attempt."""
    attempt = events[-1].end.timeline.attempts[-1]
    return attempt.prefill.worker, attempt.decode.worker
