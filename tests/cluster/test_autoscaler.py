"""Ray's autoscaler starts hosts for instances that have no room, and ends those that nothing needs: Ray's own,
with its provider of fake hosts, which are Ray nodes of this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private import monitor

from pdserve.proto import pdserve_pb2 as pb

from .harness import READY
from .test_hosts import Several

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_cluster")]

MAX_HOSTS = 2
WAIT_S = 240
# of Ray's file, without which its autoscaler does not start
UNUSED: dict[str, Any] = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


def cluster_file(decode: int) -> dict[str, Any]:
    """A file of a cloud whose hosts have one core each, and come and go."""
    context = ray.get_runtime_context()
    pool = {"cpus_per_instance": 1, "kv_cache_bytes": 64 << 20, "max_batch_size": 64}
    return {
        "cluster_name": "fake",
        "max_workers": MAX_HOSTS,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "head_node_id": context.get_node_id(),
            "gcs_address": context.gcs_address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": len(os.sched_getaffinity(0))},
                "node_config": {},
                "max_workers": 0,
            },
            "small": {
                "resources": {"CPU": 1, "object_store_memory": 80 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_HOSTS,
            },
        },
        "metadata": {
            "pdserve": {
                "model": {"max_model_len": 2048},
                "pools": {"prefill": {"instances": 1, **pool}, "decode": {"instances": decode, **pool}},
                "listen": {"grpc": "127.0.0.1:0", "http": None},
            }
        },
    }


@pytest.fixture
def autoscaler(tmp_path: Path) -> Iterator[None]:
    config = tmp_path / "cluster.yaml"
    config.write_text(json.dumps(cluster_file(1) | UNUSED))
    command = [
        sys.executable,
        str(monitor.__file__),
        f"--gcs-address={ray.get_runtime_context().gcs_address}",
        f"--autoscaling-config={config}",
        f"--logs-dir={tmp_path}",
        "--logging-level=info",
        "--logging-format=%(message)s",
        "--logging-filename=monitor.log",
        "--logging-rotate-bytes=1000000",
        "--logging-rotate-backup-count=1",
    ]
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with subprocess.Popen(command, env=environment) as process:
        yield
        assert process.poll() is None, "Ray's monitor still runs"
        process.terminate()


def wait_for_hosts(cluster: Several, num_hosts: int, num_ready: int) -> pb.ClusterStatus:
    """Waits until so many hosts have joined beside the head's, and so many workers are ready."""
    for status in cluster.admin.WatchStatus(pb.WatchStatusRequest(), timeout=WAIT_S):
        joined = sum(row.state == pb.HOST_STATE_JOINED for row in status.hosts) - 1
        ready = sum(worker.state == READY for worker in status.workers)
        if (joined, ready) == (num_hosts, num_ready):
            return status
    raise AssertionError("the status stream ended")


@pytest.mark.usefixtures("autoscaler")
def test_hosts_start_for_instances_without_room_and_end_when_they_are_needed_no_more() -> None:
    fits = len(os.sched_getaffinity(0)) - 1  # decode instances on the head, beside one prefill instance
    with closing(Several(yaml.safe_dump(cluster_file(fits)))) as cluster:
        wait_for_hosts(cluster, 0, fits + 1)
        expected = cluster.tokens()
        for num_more, num_hosts in ((1, 1), (2, 2), (0, 0)):
            text = yaml.safe_dump(cluster_file(fits + num_more))
            cluster.admin.Apply(pb.ApplyRequest(config_yaml=text))
            status = wait_for_hosts(cluster, num_hosts, fits + 1 + num_more)
            assert (len(status.hosts), status.degraded) == (1 + num_hosts, "")
            assert cluster.tokens() == expected
