"""`pdserve plan --devices`, for hardware that is not here."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdserve.cli.main import app

from ..planner.support import LLAMA_8B

QUICK = ["--devices", "2", "--rate", "20", "--requests", "20", "--slo", "ttft=500", "--prompt-tokens", "500"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["plan", *args])


def test_a_config_alone_is_enough_to_compare_splits(config_file: Path) -> None:
    result = run(*QUICK, "--model", str(config_file), "--output-tokens", "4", "--price", "3", "-o", "json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert {one["split"] for one in answer["splits"]} == {"2 colocated", "1P1D", "1P1D auto"}
    goodputs = [one["goodput_per_s"] for one in answer["splits"]]
    assert goodputs == sorted(goodputs, reverse=True) and goodputs[-1] > 0
    assert all(one["price_per_million_output_tokens"] > 0 for one in answer["splits"])


def test_the_table_names_the_best_split_and_its_settings(config_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "goodput.png"
    result = run(*QUICK, "--model", str(config_file), "--output-tokens", "1", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "best     2 colocated" in result.stdout
    assert "pools.prefill.instances: 0" in result.stdout
    assert "limits at that rate" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "h900"], "gpu: got 'h900', expected one of b200, h200"),
        (["--target", "1.5"], "target: got 1.5, expected a share"),
        (["--slo", "ttft=fast"], "slo: 'ttft=fast' is not valid"),
        (["--prompt-tokens", "9000"], "the longest request has 9064 tokens, expected at most"),
        (["--rate", "-1"], "rate: -1 is not valid"),
        (["--trace", "nowhere.csv", "--speed", "2"], "--trace has its own instants"),
    ],
)
def test_a_wrong_option_is_refused_by_name(args: list[str], message: str, config_file: Path) -> None:
    result = run(*QUICK, "--model", str(config_file), *args)
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output


def test_a_trace_whose_times_say_nothing_is_refused(config_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 5, "input_length": 10, "output_length": 2}\n' * 3)
    result = run("--devices", "2", "--model", str(config_file), "--trace", str(trace))
    assert "trace: 3 requests at one instant" in str(result.exception) + result.output


def test_a_load_has_to_be_described(config_file: Path) -> None:
    result = run("--devices", "2", "--model", str(config_file))
    assert result.exit_code != 0
    assert "--rate or --trace" in str(result.exception) + result.output
