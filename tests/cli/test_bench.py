"""`pdserve bench` as a person runs it: a table on stdout, figures in a file, pictures in a folder."""

import json
from pathlib import Path

import pytest

from pdserve.core.errors import QueueFull
from tests.cli.conftest import Run, ServerThread
from tests.gateway.support import ScriptedCluster

SHORT = ("--requests", "6", "--prompt-tokens", "8", "--output-tokens", "4", "--warm-up", "1")


def test_an_open_load_is_reported_as_table_and_file(
    run: Run, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    result = run("bench", "--rate", "1000", "--slo", "ttft=100000,tpot=100000", *SHORT, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "6 requests ended well, 0 failed" in result.stdout
    for word in (
        "goodput",
        "TTFT",
        "ITL",
        "TPOT",
        "E2E",
        "queue (router)",
        "transfer, exposed",
        "sent late",
        "tokens/s/user",
    ):
        assert word in result.stdout
    assert len(cluster.requests) == 7  # one to warm up
    figures = json.loads(file.read_text())
    (target,) = figures["targets"]
    assert (
        target["total"]["num_ok"],
        target["total"]["num_output_tokens"],
        target["total"]["good_share"],
    ) == (6, 24, 1.0)
    assert figures["load"]["rate"] == 1000


def test_two_targets_are_compared_and_drawn(run: Run, server: ServerThread, tmp_path: Path) -> None:
    names = [f"{name}={server.address}" for name in ("left", "right")]
    result = run(
        "bench", *names, "--concurrency", "2", "--rounds", "3", *SHORT, "--plots", str(tmp_path / "plots")
    )
    assert result.exit_code == 0, result.output
    assert "left: 18 requests" in result.stdout
    assert "right: 18 requests" in result.stdout
    assert "right / left" in result.stdout
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"latencies.png", "ttft.png", "legs.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "plots").iterdir())


def test_a_trace_is_replayed(run: Run, cluster: ScriptedCluster, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,2\n2023-11-16 18:15:47,9000,3\n"
    )
    result = run(
        "bench", "--trace", str(trace), "--speed", "1000", "--max-prompt-tokens", "20", "--warm-up", "0"
    )
    assert result.exit_code == 0, result.output
    assert [(len(r.prompt_token_ids), r.sampling.max_tokens) for r in cluster.requests] == [(5, 2), (20, 3)]


@pytest.mark.parametrize(("options", "warns"), [((), True), (("--prefix-tokens", "4"), False)])
def test_cached_prompts_cause_a_warning_unless_prefixes_are_shared(
    run: Run, options: tuple[str, ...], warns: bool
) -> None:
    # of each prompt a token is said to be cached
    result = run("bench", "--concurrency", "1", *SHORT, *options)
    assert ("take another --seed" in result.stdout) is warns


def test_failed_requests_are_counted_by_kind(run: Run, cluster: ScriptedCluster) -> None:
    cluster.refusal = QueueFull(8, 1.5)
    result = run("bench", "--rate", "1000", *SHORT, "--warm-up", "0")
    assert result.exit_code == 0, result.output
    assert "6 x resource exhausted" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --rate or --trace"),
        (("--rate", "1", "--concurrency", "2"), "give either --rate or --trace"),
        (("--rate", "1", "--prompt-tokens", "some"), "'some' is not a length"),
        (("--rate", "1", "--slo", "fast"), "slo: 'fast' is not valid"),
        (("--rate", "0"), "rate: 0 is not valid"),
        (("--trace", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("--trace", "/dev/zero"), "/dev/zero cannot be read: neither a regular file nor a pipe"),
        (("--trace", "/bin/sh"), "/bin/sh cannot be read: 'utf-8' codec"),
        (("--rate", "1", "--prompt-tokens", "file:/dev/zero"), "/dev/zero cannot be read"),
        (("--rate", "1", "--prompt-tokens", "9000"), "the model takes 256"),
        (("--rate", "1", "x=127.0.0.1:1", "x=127.0.0.1:2"), "both targets have the same name"),
        (("--rate", "1", "http://127.0.0.1:1"), "unreachable"),
        (("--rate", "1", "http://127.0.0.1:1", "--extra", "[]"), "--extra: expected a JSON object"),
    ],
)
def test_an_impossible_load_is_refused_in_one_line(run: Run, options: tuple[str, ...], message: str) -> None:
    result = run("bench", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("pdserve: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
