"""The files for Kubernetes agree with each other and with pdserve. They are not run here, and KubeRay's own
schema is not at hand: its fields are named below."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.cli.plan import read_config
from pdserve.core.config import ClusterConfig
from pdserve.engine.gpu import Node
from pdserve.planner.plan import plan

DEPLOY = Path(__file__).parent.parent / "deploy"
CLUSTER_FIELDS = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
GIB = 1 << 30


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """By kind."""
    text = (DEPLOY / "kuberay" / "raycluster.yaml").read_text()
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


@pytest.fixture
def config(manifests: dict[str, Any], tmp_path: Path) -> ClusterConfig:
    file = tmp_path / "cluster.yaml"
    file.write_text(manifests["ConfigMap"]["data"]["cluster.yaml"])
    return read_config(file, [])


def containers(manifests: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = manifests["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        yield container


def test_the_cluster_has_the_fields_that_kuberay_requires(manifests: dict[str, Any]) -> None:
    cluster = manifests["RayCluster"]
    assert (cluster["apiVersion"], set(cluster["spec"])) == ("ray.io/v1", CLUSTER_FIELDS)
    assert set(cluster["spec"]["headGroupSpec"]) == HEAD_FIELDS
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert set(group) == WORKER_FIELDS
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_its_pods_have_room_for_the_instances(manifests: dict[str, Any], config: ClusterConfig) -> None:
    spec = manifests["RayCluster"]["spec"]
    num_pods = 1 + sum(group["replicas"] for group in spec["workerGroupSpecs"])
    nodes = []
    for container in containers(manifests):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]  # or its cores are not its own
        num_bytes = int(resources["limits"]["memory"].removesuffix("Gi")) * GIB
        cores = tuple(range(int(resources["limits"]["cpu"])))
        nodes.append(Node(container["name"], cores, num_bytes, num_bytes))
    assert len(nodes) == num_pods
    planned = plan(config, nodes)
    planned.check()
    assert {pool.num_ranks for pool in planned.pools} == {1, 4}


def test_its_parts_name_each_other(manifests: dict[str, Any], config: ClusterConfig) -> None:
    head, *workers = containers(manifests)
    (volume,) = (
        one
        for one in manifests["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in one
    )
    assert volume["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    (mount,) = (one for one in head["volumeMounts"] if one["name"] == volume["name"])
    assert f"pdserve up {mount['mountPath']}/cluster.yaml" in head["args"][0]
    ports = {one["name"]: one["containerPort"] for one in head["ports"]}
    assert config.listen.http_host_port == ("0.0.0.0", ports["http"])
    assert config.listen.grpc_host_port == ("0.0.0.0", ports["grpc"])
    assert {one["targetPort"] for one in manifests["Service"]["spec"]["ports"]} == {"grpc", "http"}
    for container in (head, *workers):
        (token,) = (one for one in container["env"] if one["name"] == "RAY_AUTH_TOKEN")
        assert token["valueFrom"]["secretKeyRef"] == {"name": "pdserve-ray", "key": "token"}


def test_clients_are_those_that_the_network_lets_in(manifests: dict[str, Any], config: ClusterConfig) -> None:
    assert config.listen.allow_insecure
    policy = manifests["NetworkPolicy"]["spec"]
    (own, clients) = policy["ingress"]
    label = policy["podSelector"]
    assert own["from"] == [{"podSelector": label}]
    assert [one["port"] for one in clients["ports"]] == [50051, 8000]
    for group in (
        manifests["RayCluster"]["spec"]["headGroupSpec"],
        *manifests["RayCluster"]["spec"]["workerGroupSpecs"],
    ):
        assert group["template"]["metadata"]["labels"] == label["matchLabels"]


def test_the_image_is_built_from_files_that_are_there() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for name in ("constraints.txt", "pyproject.toml", "hatch_build.py"):
        assert (DEPLOY.parent / name).is_file()
    assert "--constraint constraints.txt ." in text
