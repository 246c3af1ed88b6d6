"""A cluster of several hosts, Ray nodes of this machine with addresses of their own: it grows and shrinks
with them."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
import ray
import yaml
from ray._private.node import Node
from ray._private.parameter import RayParams

from pdserve import __version__
from pdserve.cluster.launch import launch
from pdserve.core.config_file import parse_cluster_config
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

from .harness import READY, process_of, tokens_of

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_cluster")]

OTHER = "127.0.0.2"


@contextmanager
def host(address: str, num_cpus: int) -> Iterator[None]:
    """A host that joins this test session's Ray, and fails in the end. Its Ray is started again when it ends by
    itself, as `ray up` has it: on a busy machine it may abort within seconds."""
    fails = threading.Event()
    with ThreadPoolExecutor(1) as keeper:
        kept = keeper.submit(_keep_ray, address, num_cpus, fails)
        try:
            yield
        finally:
            fails.set()
            kept.result()


def _keep_ray(address: str, num_cpus: int, fails: threading.Event) -> None:
    context = ray.get_runtime_context()
    while not fails.is_set():
        params = RayParams(
            gcs_address=context.gcs_address,
            node_ip_address=address,
            num_cpus=num_cpus,
            object_store_memory=80 << 20,
            temp_dir=context.get_temp_dir(),
            min_worker_port=0,
            max_worker_port=0,
            include_log_monitor=False,
        )
        node = Node.__new__(Node)
        try:
            Node.__init__(node, params, head=False, shutdown_at_exit=False, spawn_reaper=False)
            while not node.dead_processes() and not fails.wait(0.2):
                pass
        except Exception as error:  # Ray has no narrower one for a node that does not start
            print(f"Ray does not start at {address}: {error}")
        for name, process in node.dead_processes():
            print(f"Ray's {name} has ended at {address} with {process.returncode}")
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def file(*worker_ips: str, decode: int) -> str:
    pool = {"cpus_per_instance": 1, "kv_cache_bytes": 64 << 20, "max_batch_size": 64}
    ours = {
        "model": {"max_model_len": 2048},
        "pools": {"prefill": {"instances": 1, **pool}, "decode": {"instances": decode, **pool}},
        "listen": {"grpc": "127.0.0.1:0", "http": None},
    }
    provider = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": list(worker_ips)}
    return yaml.safe_dump({"provider": provider, "metadata": {"pdserve": ours}})


class Several:
    """A cluster that may be short of hosts."""

    def __init__(self, text: str) -> None:
        self.launched = launch(parse_cluster_config(text))
        self._local = grpc.insecure_channel(self.launched.local_address)
        self.admin = rpc.ClusterStub(self._local)
        self.generation = rpc.GenerationStub(self._local)

    def close(self) -> None:
        self._local.close()
        self.launched.stop()

    def wait_for(self, host: str, state: str, num_ready: int, said: str | None = None) -> pb.ClusterStatus:
        """Waits until the other host is in a state, the given number of workers is ready, and the status
        says so, even if the head dies meanwhile."""
        status = pb.ClusterStatus()
        while True:
            try:
                for status in self.admin.WatchStatus(
                    pb.WatchStatusRequest(), timeout=240, wait_for_ready=True
                ):
                    rows = {
                        row.address: pb.HostState.Name(row.state).removeprefix("HOST_STATE_")
                        for row in status.hosts
                    }
                    if (
                        rows.get(host) == state
                        and sum(worker.state == READY for worker in status.workers) == num_ready
                        and (said is None or said in status.degraded)
                    ):
                        return status
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise AssertionError(
                        f"{host} is not {state} with {num_ready} workers: {status}"
                    ) from error

    def tokens(self) -> list[int]:
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text="import this"),
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
        )
        return tokens_of(self.generation.GenerateStream(request, timeout=60))


def test_a_cluster_grows_and_shrinks_with_its_hosts() -> None:
    num_cores = len(os.sched_getaffinity(0))
    fits = num_cores - 1  # decode instances on the head, beside one prefill instance
    with closing(Several(file(OTHER, decode=fits + 1))) as cluster:
        status = cluster.wait_for(OTHER, "AWAITED", fits + 1)
        assert f"host {OTHER}: has not joined; waiting for it" in status.degraded
        (waiting,) = (worker for worker in status.workers if worker.state != READY)
        assert waiting.phase.startswith(f"waiting: {waiting.worker_id} needs 1 core(s)")
        expected = cluster.tokens()
        before = {worker.worker_id: worker.pid for worker in status.workers}
        with host(OTHER, 1):
            status = cluster.wait_for(OTHER, "JOINED", fits + 2)
            (row,) = (row for row in status.hosts if row.address == OTHER)
            assert list(row.worker_ids) == [waiting.worker_id]
            assert (row.num_cores_taken, row.num_cores) == (1, 1)
            assert not status.degraded
            after = {
                worker.worker_id: worker.pid
                for worker in status.workers
                if worker.worker_id != waiting.worker_id
            }
            assert after == {name: pid for name, pid in before.items() if pid}, "nobody was moved"

            taken_out = cluster.admin.Apply(pb.ApplyRequest(config_yaml=file(decode=fits)))
            assert [change.key for change in taken_out.changes] == [
                "pools.decode.instances",
                "provider.worker_ips",
            ]
            status = cluster.wait_for(OTHER, "LEAVING", fits + 1)
            assert all(worker.pid in before.values() for worker in status.workers if worker.state == READY)
            with pytest.raises(grpc.RpcError, match=r"found no room"):
                cluster.admin.Apply(pb.ApplyRequest(config_yaml=file(decode=fits + 1)))

            cluster.admin.Apply(pb.ApplyRequest(config_yaml=file(OTHER, decode=fits + 1)))
            cluster.wait_for(OTHER, "JOINED", fits + 2)
        status = cluster.wait_for(OTHER, "LOST", fits + 1)
        assert f"host {OTHER}: is lost" in status.degraded
        assert cluster.tokens() == expected
        with host(OTHER, 1):
            before = {
                worker.worker_id: worker.pid for worker in cluster.wait_for(OTHER, "JOINED", fits + 2).workers
            }
            assert cluster.tokens() == expected
            os.kill(process_of("HeadActor"), signal.SIGKILL)
            status = cluster.wait_for(OTHER, "JOINED", fits + 2)
            assert {worker.worker_id: worker.pid for worker in status.workers} == before, (
                "they were taken over"
            )
            (row,) = (row for row in status.hosts if row.address == OTHER)
            assert list(row.worker_ids) == [waiting.worker_id]
            assert cluster.tokens() == expected


def test_a_host_with_another_version_is_refused_with_cause_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import pdserve; pdserve.__version__ = '0.0.9'")
    with closing(Several(file(OTHER, decode=1))) as cluster:
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")  # of processes that start from now on
        with host(OTHER, 1):
            said = f"host {OTHER}: it runs pdserve 0.0.9, the head {__version__}; install {__version__} there"
            status = cluster.wait_for(
                OTHER, "REFUSED", 2, said
            )  # a host that is slow may be said to be silent before
            (row,) = (row for row in status.hosts if row.address == OTHER)
            assert not row.worker_ids
            assert cluster.tokens()
