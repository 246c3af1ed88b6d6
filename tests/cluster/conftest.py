"""Real clusters: Ray actors, sockets, shared memory. One Ray for the whole session, and one cluster after the
other in it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pdserve.cluster.ray_start import without_unused_processes
from pdserve.core.admin_socket import RUNTIME_FOLDER
from pdserve.embedded import MODEL_DIR

from ..checkpoints import small_checkpoint
from .harness import SESSION_MARK, Clusters, session_processes


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> Iterator[None]:
    """Ray as `pdserve up` would start it, shared by all tests; removed without a trace at the end."""
    # mode 0700: Ray's own folder is world-writable
    temp_dir = tempfile.mkdtemp(prefix="pdserve-test-", dir="/tmp")
    os.environ[SESSION_MARK] = temp_dir
    os.environ[RUNTIME_FOLDER] = f"{temp_dir}/runtime"
    shared_memory = set(os.listdir("/dev/shm"))
    with without_unused_processes():
        ray.init(
            num_cpus=len(os.sched_getaffinity(0)),
            num_gpus=2,  # mere numbers to Ray: nothing computes on them
            include_dashboard=False,
            namespace="pdserve",
            object_store_memory=80 << 20,
            log_to_driver=False,
            _temp_dir=f"{temp_dir}/ray",
            _system_config={"worker_niceness": 0},
        )
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)
    del os.environ[RUNTIME_FOLDER]
    assert session_processes() == {}
    assert not [
        name
        for name in set(os.listdir("/dev/shm")) - shared_memory
        if name.startswith(("plasma", "psm", "pdserve"))
    ]


@pytest.fixture(scope="session")
def clusters(ray_session: None) -> Iterator[Clusters]:
    clusters = Clusters()
    yield clusters
    clusters.end()


@pytest.fixture
def no_cluster(clusters: Clusters) -> None:
    """Room for a cluster that the test launches."""
    clusters.end()


@pytest.fixture(scope="session")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model that a test may damage, and repairs."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path_factory.mktemp("own") / "model"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoints":
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


class Checkpoints:
    """Random checkpoints by name, each with the embedded model's tokenizer beside it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> Path:
        path = self._directory / name
        if not path.exists():
            small_checkpoint(self._directory, name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODEL_DIR / file, path)
        return path
