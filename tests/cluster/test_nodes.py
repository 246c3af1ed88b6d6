"""The hosts of a Ray cluster as the head sees them, and whether they may serve beside it."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import TaskUnschedulableError, WorkerCrashedError

from pdserve.cluster import nodes as nodes_module
from pdserve.cluster.nodes import RayNodes
from pdserve.core.config import ClusterConfig
from pdserve.embedded import MODEL_DIR
from pdserve.engine.gpu import DeviceInfo, Node
from pdserve.head import host_facts
from pdserve.head.host_facts import HostFacts, look, refusal, warning
from pdserve.router.cores import Capacity
from pdserve.router.hosts import HostChecked, SeenHost

HEAD, B, C = ("a" * 56, "b" * 56, "c" * 56)
GPUS = tuple(DeviceInfo(index, "NVIDIA L4", f"GPU-{index}", 24 << 30, 24 << 30) for index in range(2))
NODE = Node("there", (0, 1, 2, 3), 16 << 30, 8 << 30)
FACTS = HostFacts("0.1.0", 1e9, NODE, "f00d")
ROUTER = ("10.0.0.1", 6700)


def alive(name: str, address: str, is_alive: bool = True, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": name,
        "Alive": is_alive,
        "NodeManagerAddress": address,
        "NodeManagerHostname": f"host-{address[-1]}",
        "Labels": {"ray.io/node-group": "gpu_worker"} if "GPU" in resources else {},
        "Resources": resources,
    }


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns each host's answer, by node id: an exception is raised, None never arrives."""
    devices = [tuple(vars(gpu).values()) for gpu in GPUS]
    answers: dict[str, Any] = {B: look("embedded", None, "/tmp") | {"cores": [0, 1, 2], "devices": devices}}
    found = [
        alive(B, "10.0.0.2", CPU=2.0, GPU=1.0),
        alive(HEAD, "10.0.0.1", CPU=1.0),
        alive(C, "10.0.0.3", False, CPU=1.0),
    ]
    context = SimpleNamespace(get_node_id=lambda: HEAD)
    cancelled: list[Any] = []

    async def there(name: str) -> Any:
        answer = answers[name]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    task = SimpleNamespace(
        options=lambda scheduling_strategy: SimpleNamespace(
            remote=lambda *arguments: there(scheduling_strategy.node_id)
        )
    )
    monkeypatch.setattr(nodes_module, "_look_there", task)
    monkeypatch.setattr(nodes_module, "CHECK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(nodes_module, "session_folder", lambda: Path("/tmp"))
    monkeypatch.setattr(
        nodes_module,
        "ray",
        SimpleNamespace(
            nodes=lambda: found,
            get_runtime_context=lambda: context,
            cancel=lambda ref, force: cancelled.append(ref),
        ),
    )
    return answers


async def test_hosts_that_are_alive_are_seen_the_head_first(machines: dict[str, Any]) -> None:
    assert await RayNodes("embedded", ROUTER).seen() == (
        SeenHost(HEAD, "10.0.0.1", "host-1", is_head=True),
        SeenHost(B, "10.0.0.2", "host-2", "gpu_worker"),
    )


async def test_a_host_has_the_resources_that_it_reports_and_ray_was_given(machines: dict[str, Any]) -> None:
    machines[B]["torch_cuda"] = "13.0"
    nodes = RayNodes("embedded", ROUTER)
    head, other = await nodes.ask_all(60.0)
    assert len(head.cores) == 1
    assert (other.name, other.cores, other.devices) == (B, (0, 1), GPUS[:1])
    assert await nodes.check(B, ClusterConfig(), "cuda") == HostChecked(B, Capacity(2, 1))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "has not answered within 0.05 s"),
        ({"version": "0.0.1"}, "see whether pdserve 0.1.0 is installed there"),
        (ModuleNotFoundError("No module named 'pdserve'"), "No module named 'pdserve'"),
        (WorkerCrashedError(), "make room in its memory and in Ray's folder"),
        (
            TaskUnschedulableError("the node does not exist any more"),
            "it has left; it is used again once Ray",
        ),
    ],
)
async def test_an_unreachable_host_is_refused_with_a_fix(
    machines: dict[str, Any], answer: Any, said: str
) -> None:
    machines[B] = answer
    nodes = RayNodes("embedded", ROUTER)
    await nodes.ask_here()
    assert said in (await nodes.check(B, ClusterConfig(), "cpu")).refusal


async def test_the_heads_own_host_is_refused_when_it_is_full(
    machines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = RayNodes("embedded", ROUTER)
    await nodes.seen()
    assert (await nodes.check(HEAD, ClusterConfig(), "cpu")).refusal == ""
    monkeypatch.setattr(host_facts, "full_parts", lambda ray_folder: ((ray_folder, 1 << 30),))
    refused = (await nodes.check(HEAD, ClusterConfig(), "cpu")).refusal
    assert "no space is left in /tmp (1 GiB) there; make room" in refused


def judged(there: HostFacts, **pool: Any) -> str:
    config = ClusterConfig.model_validate(
        {"pools": {"prefill": pool, "decode": pool}, "model": {"path": "/models/m"}}
    )
    return refusal(FACTS, there, config, "cpu", ROUTER)


def test_a_host_like_the_heads_may_serve() -> None:
    assert judged(replace(FACTS, clock_s=2e9, node=replace(NODE, cores=(0,)))) == ""


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"version": "0.0.9"}, "it runs pdserve 0.0.9, the head 0.1.0; install 0.1.0 there"),
        (
            {"fingerprint": "beef"},
            "another checkpoint lies at /models/m there (fingerprint beef, the head's is f00d)",
        ),
        (
            {"fingerprint": None, "checkpoint_error": "/models/m: no such directory"},
            "model.path: /models/m: no such directory (on this host); copy the head's checkpoint",
        ),
        (
            {"full": (("/dev/shm", 64 << 20), ("/tmp", 1 << 30))},
            "no space is left in /dev/shm (64 MiB), /tmp (1 GiB) there; make room",
        ),
        (
            {"router_error": "Connection refused"},
            (
                "from there 10.0.0.1:6700, where the head waits for workers, cannot be reached (Connection"
                " refused); let all TCP"
            ),
        ),
        (
            {"node": replace(NODE, cores=(0,))},
            "1 core(s), and no instance takes less than 2 (pools.*.devices_per_instance)",
        ),
    ],
)
def test_a_host_that_differs_is_refused_with_cause_and_fix(there: dict[str, Any], said: str) -> None:
    assert said in judged(replace(FACTS, **there), devices_per_instance=2)


def test_clocks_that_differ_are_a_warning_as_nothing_depends_on_them() -> None:
    assert warning(FACTS, replace(FACTS, clock_s=FACTS.clock_s + 3600), "cpu", 0.1).startswith(
        "its clock is 3600 s ahead of the head's"
    )
    assert warning(FACTS, replace(FACTS, clock_s=FACTS.clock_s - 59), "cpu", 0.1) == ""


def test_a_host_without_gpus_in_a_gpu_cluster_is_reported_unusable() -> None:
    assert "no GPU that torch can use" in warning(FACTS, FACTS, "cuda", 0.1)


def test_looking_finds_the_checkpoint_and_the_link_to_the_head(tmp_path: Path) -> None:
    here = HostFacts.parse(look("embedded", None, "/tmp"), "here")
    assert here.fingerprint and not here.router_error
    copy = shutil.copytree(MODEL_DIR, tmp_path / "copy")
    assert look(str(copy), None, "/tmp")["fingerprint"] == here.fingerprint
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert look(str(copy), None, "/tmp")["fingerprint"] != here.fingerprint
    nowhere = look(str(tmp_path / "none"), ("127.0.0.1", 1), "/tmp")
    assert nowhere["fingerprint"] is None and "no such file" in nowhere["checkpoint_error"]
    assert nowhere["router_error"] == "Connection refused"
