"""The repository's cluster.yaml, as Ray's launcher and pdserve read it."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pdserve.core.config_file import ConfigSource

TEXT = (Path(__file__).parents[2] / "cluster.yaml").read_text()
CLOUDS = {"AWS": "aws", "GCP": "gcp", "Azure": "azure"}


def for_cloud(cloud: str) -> str:
    """The file with a cloud's lines in place of `provider` and `auth`."""
    commented = re.search(rf"^# --- {cloud}:.*\n((?:#.*\n)*?)# *(?:---.*)?\n", TEXT, re.MULTILINE)
    assert commented is not None
    section = "".join(line.removeprefix("# ").removeprefix("#") + "\n" for line in commented[1].splitlines())
    local = re.search(r"^provider:.*?(?=^# On a cloud)", TEXT, re.MULTILINE | re.DOTALL)
    assert local is not None
    return TEXT.replace(local[0], section)


def as_ray_reads_it(text: str) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_ray_accepts_the_file_as_it_is() -> None:
    assert as_ray_reads_it(TEXT)["provider"]["type"] == "local"


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_runs_at_the_address_that_ssh_reached(commands: str) -> None:
    start = as_ray_reads_it(TEXT)[commands][-1]
    option = re.search(r"--node-ip-address=\$\(.*?\)", start)
    assert option is not None
    shown = subprocess.check_output(
        ["sh", "-c", f"echo {option[0]}"],
        env=os.environ | {"SSH_CONNECTION": "10.0.0.9 50000 10.0.0.2 22"},
        text=True,
    )
    assert shown == "--node-ip-address=10.0.0.2\n"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_cloud_sections_with_gpu_node_types(cloud: str) -> None:
    config = as_ray_reads_it(for_cloud(cloud))
    assert config["provider"]["type"] == CLOUDS[cloud]
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(node["min_workers"] for node in types.values()) == config["max_workers"]
    for pool in config["metadata"]["pdserve"]["pools"]:
        assert types[pool]["min_workers"] == types[pool]["max_workers"] == 1
        assert cloud == "AWS" or types[pool]["resources"]["GPU"] == 1  # of AWS's types, Ray knows
        assert types[pool]["node_config"] != types["head"]["node_config"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pdserve_accepts_the_lines_for_a_cloud(cloud: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(for_cloud(cloud))
    assert ConfigSource.read(tmp_path / "cluster.yaml").config().model.path == "embedded"
