"""The end of a cluster: streams finish first, then nothing is left of it, even when its keeper dies."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import ray
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.core import admin_socket
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

from .harness import ADMIN_WITH_KEY, Clusters, process_of, tokens_of

pytestmark = pytest.mark.cluster


def test_shutting_down_lets_streams_finish_and_ends_every_worker(clusters: Clusters) -> None:
    cluster = clusters.take(listen=ADMIN_WITH_KEY)
    try:
        stream = cluster.generation.GenerateStream(cluster.request("import this", max_tokens=200))
        events = [next(iter(stream))]
        progress = cluster.admin.Drain(pb.DrainRequest(shutdown=True))
        events += list(stream)
        assert len(tokens_of(events)) == 200
        assert list(progress)[-1].done
    finally:
        cluster.channel.close()
        cluster._launched.stop()
    assert not admin_socket.socket_link(cluster.address).is_symlink()


def test_sigterm_lets_streams_finish_refuses_new_requests_and_ends_the_process(
    tmp_path: Path, no_cluster: None
) -> None:
    pool = {"cpus_per_instance": 0.5, "kv_cache_bytes": 64 << 20, "max_batch_size": 64}
    settings = {
        "pools": {"prefill": pool, "decode": pool},
        "listen": {"grpc": "127.0.0.1:0", "http": None},
        "observability": {"log_format": "console"},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"metadata": {"pdserve": settings}}))
    command = [
        sys.executable,
        "-c",
        "from pdserve.cli.entry import main; main()",
        "up",
        str(tmp_path / "cluster.yaml"),
    ]
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.getcwd(),
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        address = next(
            line.split(" at ")[1].split(",")[0] for line in process.stderr if line.startswith("ready: ")
        )
        # logprobs make the stream larger than what is buffered on its way: it runs until it is read
        sampling = pb.SamplingParams(max_tokens=900, logprobs=20, ignore_eos=True)
        request = pb.GenerateRequest(prompt=pb.Prompt(text="import this"), sampling=sampling)
        with grpc.insecure_channel(address, [("grpc.http2.bdp_probe", 0)]) as channel:
            generation = rpc.GenerationStub(channel)
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=240)
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            stream = generation.GenerateStream(request, timeout=240)
            events = [next(iter(stream))]
            process.send_signal(signal.SIGTERM)
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as refused:
                generation.Generate(request, timeout=240)
            events += list(stream)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refused.value.details() == "the cluster is shutting down"
        assert len(tokens_of(events)) == 900
        assert "stopped" in process.stderr.read().splitlines()
        assert process.wait(60) == 0


def test_the_keepers_death_is_reported_and_ends_head_and_workers(clusters: Clusters) -> None:
    cluster = clusters.take()
    try:
        keeper = process_of("KeeperActor")
        others = (process_of("HeadActor"), *cluster.pids().values())
        processes = [os.pidfd_open(pid) for pid in (keeper, *others)]
        os.kill(keeper, signal.SIGKILL)
        for process in processes:
            ended, _, _ = select.select([process], [], [], 60.0)  # readable when the process has ended
            os.close(process)
            assert ended
        assert cluster._launched._over.wait(60.0)
        assert "died" in str(cluster._launched.poll())
    finally:
        cluster.channel.close()
        cluster._launched.stop()
