"""Launches that come to nothing: they say why in a few words and leave nothing behind."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray

from pdserve.cluster.launch import LaunchError, launch
from pdserve.core.config import ClusterConfig

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"path": "/nowhere"}}, r"^/nowhere: no such directory"),
        ({"pools": {"prefill": {"instances": 400}}}, r"core"),
    ],
)
def test_what_cannot_run_is_not_launched(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        launch(ClusterConfig.model_validate(settings | {"listen": {"grpc": "127.0.0.1:0"}}))
    assert "Traceback" not in str(caught.value)


def test_a_launch_interrupted_while_ray_starts_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(**options: Any) -> None:
        assert Path(options["_temp_dir"]).is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", interrupted)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path / "ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    with pytest.raises(KeyboardInterrupt):
        launch(ClusterConfig.model_validate({"listen": {"grpc": "127.0.0.1:0"}}))
    assert list(tmp_path.iterdir()) == []
