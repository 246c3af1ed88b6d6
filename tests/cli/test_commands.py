"""The output of commands: text on stdout, one clear line on stderr and status 1 for errors, 2 for wrong
usage."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdserve import __version__
from pdserve.cli import client
from pdserve.cli.client import MAX_REPLY_BYTES, OPTIONS
from pdserve.cli.explain import explanation_lines
from pdserve.cli.generate import write_out
from pdserve.cli.main import app
from pdserve.cli.requests import request_lines
from pdserve.core.errors import QueueFull
from pdserve.core.hosts import HostState, HostStatus
from pdserve.core.status import WorkerState
from pdserve.embedded import MODEL_DIR
from pdserve.proto import pdserve_pb2 as pb
from tests.cli.conftest import Run, ServerThread
from tests.gateway.support import ScriptedCluster
from tests.gateway.test_admin import config_yaml


def test_generate_streams_the_text_to_stdout(run: Run, cluster: ScriptedCluster) -> None:
    result = run("generate", "hello", "--max-tokens", str(len(cluster.token_ids)))
    assert (result.exit_code, result.stdout) == (0, "the quick brown fox jumps over the lazy dog\n")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("is_terminal", "shown"), [(True, r"a\x1b]0;b\x07\r\x9b2J"), (False, "a\x1b]0;b\x07\r\x9b2J")]
)
def test_a_model_controls_no_terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, shown: str) -> None:
    stdout = StringIO(newline="")
    monkeypatch.setattr(stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    write_out("a\x1b]0;b\x07\r\x9b2J\t\n")
    assert stdout.getvalue() == shown + "\t\n"


def test_an_answer_without_end_is_not_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OPTIONS", (("grpc.max_receive_message_length", 10),))
    result = run("generate", "hello", "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("pdserve: the answer is too large: ")
    assert dict(OPTIONS)["grpc.max_receive_message_length"] == MAX_REPLY_BYTES > 0


def test_every_sampling_option_arrives(run: Run, cluster: ScriptedCluster) -> None:
    options = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1"
        " --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --seed 42 -n 2 --stop one"
        " --stop two --stop-token-id 5 --ignore-eos --logprobs 1 --prompt-logprobs 2 --logit-bias 7=-2.5"
        " --logit-bias 9=100 --request-id mine --timeout 60"
    )
    assert run("generate", "hello", *options.split()).exit_code == 0
    (request,) = cluster.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_k) == (9, 2, 0.5, 7)
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.9, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed, sampling.n) == (
        0.2,
        0.3,
        42,
        2,
    )
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == (
        ("one", "two"),
        (5,),
        True,
        1,
    )
    assert (sampling.prompt_logprobs, sampling.logit_bias) == (2, ((7, -2.5), (9, 100.0)))
    assert request.request_id == "mine"
    assert request.deadline_s is not None


def test_options_that_are_not_given_are_left_to_the_server(run: Run, cluster: ScriptedCluster) -> None:
    run("generate", "hello")
    sampling = cluster.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.ignore_eos) == (1.0, 1.0, 1, False)


def test_several_choices_are_printed_one_after_the_other(run: Run) -> None:
    result = run("generate", "hello", "-n", "2", "--stop", " brown")
    assert result.stdout == "--- 0\nthe quick\n--- 1\nthe quick\n"


def test_generate_as_json_has_the_whole_answer(run: Run) -> None:
    answer = json.loads(run("generate", "hello", "--max-tokens", "3", "--logprobs", "1", "--json").stdout)
    assert answer["choices"][0]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert len(answer["choices"][0]["logprobs"]) == 3
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("bias", ["7", "7=", "=1", "a=1", "7=b", "-1=1", "4294967296=1"])
def test_a_bias_that_is_none_is_named(run: Run, bias: str) -> None:
    result = run("generate", "hello", f"--logit-bias={bias}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"pdserve: --logit-bias: '{bias}' is not valid, expected")


def test_the_timeline_draws_each_leg_on_stderr(run: Run) -> None:
    result = run("generate", "hello", "--max-tokens", "3", "--timeline")
    assert "█" not in result.stdout
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["queue", "prefill", "transfer", "decode"]
    assert "first token after 40 ms" in lines[1]
    assert "4 MiB in 4 chunks, 75% hidden" in lines[4]
    assert "░" in lines[4]
    assert "▓" in lines[4]


def test_prompts_come_from_stdin_as_chat_or_as_token_ids(run: Run, cluster: ScriptedCluster) -> None:
    assert run("generate", "-", stdin="hello").exit_code == 0
    assert run("generate", "hello", "--chat", "--system", "be brief").exit_code == 0
    assert run("generate", "5, 6 7", "--token-ids").exit_code == 0
    text, chat, ids = (request.prompt_token_ids for request in cluster.requests)
    assert cluster.tokenizer.decode(text) == "hello"
    assert cluster.tokenizer.decode(chat).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>"
    )
    assert ids == (5, 6, 7)


def test_chat_keeps_the_conversation(run: Run, cluster: ScriptedCluster) -> None:
    result = run("chat", "--max-tokens", "4", stdin="hi\nand then?\n")
    assert result.exit_code == 0
    answer = cluster.tokenizer.decode(cluster.token_ids[:4])
    assert result.stdout == f"{answer}\n{answer}\n"
    prompt = cluster.tokenizer.decode(cluster.requests[1].prompt_token_ids)
    assert (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\nand"
        " then?" in prompt
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hello", "--temperature", "-1"], "temperature: -1.0 is not valid, expected 0 to 100"),
        (["generate", ""], "prompt.text: '' is not valid"),
        (["generate", "hello", "--model", "gpt"], "model: 'gpt' is not served here, expected 'tiny'"),
        (["generate", "x,y", "--token-ids"], "--token-ids: 'x,y' is not valid"),
        (["drain", "nobody"], "worker_ids: 'nobody' is not valid"),
        (["apply", "no-such-file.yaml"], "no-such-file.yaml: cannot be read"),
        (["validate", "no-such-file.yaml"], "no-such-file.yaml: no such file"),
        (["plan", "no-such-file.yaml"], "no-such-file.yaml: no such file"),
        (["apply", "/dev/zero"], "/dev/zero: cannot be read: neither a regular file nor a pipe"),
        (["validate", "/dev/zero"], "/dev/zero: cannot be read: neither a regular file nor a pipe"),
        (["up", "no-such-file.yaml"], "no-such-file.yaml: no such file"),
        (["up", "{no_model}"], "{no_model}:1: metadata.pdserve.model.path: /no/such/model: no such file or"),
        (
            ["plan", "{no_model}"],
            "{no_model}:1: metadata.pdserve.model.path: /no/such/model: no such file or",
        ),
    ],
)
def test_errors_are_one_clear_line_and_status_1(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    no_model = tmp_path / "no_model.yaml"
    no_model.write_text("metadata: {pdserve: {model: {path: /no/such/model}}}")
    result = run(*(argument.format(no_model=no_model) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"pdserve: {message.replace('{no_model}', str(no_model))}")
    assert result.stderr.count("\n") == 1


def test_a_full_queue_says_when_to_come_back(run: Run, cluster: ScriptedCluster) -> None:
    cluster.refusal = QueueFull(1024, 2.5)
    result = run("generate", "hello")
    assert (result.exit_code, result.stderr) == (
        1,
        "pdserve: 1024 requests are queued already, retry in 2.5 s\n",
    )


@pytest.mark.parametrize("command", [["status"], ["requests"], ["generate", "Hello"]])
def test_without_a_server_it_says_how_to_start_one(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--address", "127.0.0.1:1"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "pdserve: no pdserve server answers at 127.0.0.1:1 (--address); start one with `pdserve up`"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hello", "--heat", "3"],
        ["generate"],
        ["drain"],
        ["drain", "a", "--all"],
        ["generate", "1", "--chat", "--token-ids"],
    ],
)
def test_wrong_usage_is_status_2(run: Run, cluster: ScriptedCluster, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
    assert cluster.requests == []


def test_status_reads_like_kubectl(run: Run) -> None:
    lines = run("status").stdout.splitlines()
    assert lines[0] == "tiny: serving for 61m; prefill 1/1 ready, decode 0/1 ready; 3 running, 2 queued"
    assert lines[2].split() == [
        "NAME",
        "ROLE",
        "STATE",
        "RUNNING",
        "WAITING",
        "BLOCKS",
        "TOKENS/S",
        "AGE",
        "RESTARTS",
    ]
    assert lines[3].split() == ["prefill-0", "prefill", "Ready", "1", "0", "90/100", "1234", "61m", "0"]
    assert lines[4].split() == ["decode-0", "decode", "Starting(50%)", "0", "0", "0/0", "0", "0s", "0"]
    assert "NODE" in run("status", "-o", "wide").stdout


def test_status_lists_several_hosts_and_their_instances(run: Run, server: ServerThread) -> None:
    hosts = (
        HostStatus(
            address="10.0.0.1",
            name="head",
            state=HostState.JOINED,
            since_s=7300.0,
            num_cores=4,
            num_cores_taken=1.5,
            memory_bytes=8 << 30,
            worker_ids=("decode-0", "prefill-0"),
        ),
        HostStatus(
            address="10.0.0.2",
            name="b",
            state=HostState.REFUSED,
            since_s=7.0,
            message="it runs pdserve 0.0.9",
        ),
        HostStatus(
            address="10.0.0.3",
            name="c",
            state=HostState.JOINED,
            since_s=7.0,
            message="its clock is 3600 s ahead",
        ),
        HostStatus(
            address="10.0.0.4",
            state=HostState.AWAITED,
            since_s=12.0,
            message="has not joined; waiting for it",
        ),
    )
    degraded = "host 10.0.0.2: it runs pdserve 0.0.9; host 10.0.0.4: has not joined; waiting for it"
    server.call(lambda: server.cluster.change(hosts=hosts, degraded=degraded))
    lines = run("status").stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("HOST"))
    assert [line.split() for line in lines[start : start + 5]] == [
        ["HOST", "NAME", "STATE", "SINCE", "CORES", "GPUS", "MEMORY", "INSTANCES"],
        ["10.0.0.1", "head", "Joined", "2h", "1.5/4", "0/0", "8", "GiB", "decode-0,prefill-0"],
        ["10.0.0.2", "b", "Refused", "7s", "0/0", "0/0", "-", "-"],
        ["10.0.0.3", "c", "Joined", "7s", "0/0", "0/0", "-", "-"],
        ["10.0.0.4", "-", "Awaited", "12s", "0/0", "0/0", "-", "-"],
    ]
    assert degraded in lines
    assert "host 10.0.0.3: its clock is 3600 s ahead" in lines
    assert "decode-0: loading weights" in lines
    status = json.loads(run("status", "-o", "json").stdout)
    assert [host["state"] for host in status["hosts"]] == [
        "HOST_STATE_JOINED",
        "HOST_STATE_REFUSED",
        "HOST_STATE_JOINED",
        "HOST_STATE_AWAITED",
    ]
    assert status["hosts"][0]["worker_ids"] == ["decode-0", "prefill-0"]


def test_status_of_one_host_has_no_table_of_hosts(run: Run) -> None:
    assert "HOST" not in run("status").stdout


def test_status_as_json_has_every_field(run: Run) -> None:
    status = json.loads(run("status", "-o", "json").stdout)
    assert status["workers"][1]["phase"] == "loading weights"
    assert status["workers"][0]["num_restarts"] == 0


def test_status_watch_follows_until_the_cluster_ends(run: Run, server: ServerThread) -> None:
    server.call(lambda: server.cluster.change(shutting_down=True))
    (line,) = run("status", "--watch", "-o", "json").stdout.splitlines()
    assert json.loads(line)["shutting_down"] is True


def test_explain_shows_each_leg_and_why_it_ran_there(run: Run) -> None:
    run("generate", "hello", "--max-tokens", "7", "--request-id", "mine")
    result = run("explain", "mine")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.stdout.startswith("'mine': length after 100 ms, 4 + 7 tokens, first token after 40 ms\n")
    assert ["queue", "-", "10", "ms"] in lines
    assert ["prefill", "28", "ms", "25", "ms"] in lines
    assert ["token", "gap", "10", "ms", "10", "ms"] in lines
    assert "for the least predicted cost: 34 ms, against 50 ms at prefill-1 -> decode-0" in result.stdout


def test_explain_shows_the_user_if_a_request_has_one() -> None:
    def lines(user: str) -> list[str]:
        return list(explanation_lines(pb.Explanation(request_id="mine", user=user)))[1:]

    assert lines("alice") == ["user 'alice'"]
    assert lines("") == []


def test_requests_are_listed_with_their_ends_and_sizes(run: Run) -> None:
    assert run("requests").stdout == "no requests\n"
    for name in ("r1", "r2"):
        run("generate", "the dog", "--max-tokens", "7", "--request-id", name)
    header, *rows = run("requests").stdout.splitlines()
    assert header.split() == ["REQUEST", "OUTCOME", "TOKENS", "TTFT", "TIME", "AGE"]
    assert [row.split()[:5] for row in rows] == [
        ["r2", "length", "2+7", "40", "ms"],
        ["r1", "length", "2+7", "40", "ms"],
    ]
    assert len(run("requests", "-n", "1").stdout.splitlines()) == 2
    wide = run("requests", "-o", "wide").stdout.splitlines()[1].split()
    assert wide[-3:-1] == ["prefill-0", "decode-0"]
    assert json.loads(run("requests", "-o", "json").stdout)["requests"][1]["request_id"] == "r1"


def test_a_list_of_requests_fits_80_columns() -> None:
    summary = pb.RequestSummary(
        request_id="1f5e187853ba497296f69aed680da409",
        outcome="cancelled",
        prompt_tokens=12345,
        completion_tokens=1234,
        first_token_s=12.3456,
        duration_s=123.456,
        age_s=5000,
    )
    assert max(map(len, request_lines([summary]))) <= 80


def test_explain_says_when_a_request_is_not_known(run: Run) -> None:
    result = run("explain", "never\nheard")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == "pdserve: request_id: 'never\\nheard' is not being served, and not among those that ended last\n"
    )


@pytest.mark.parametrize(
    ("chosen", "following", "why"),
    [
        ({}, {"has_failed": True}, "because this request had failed at prefill-1 -> decode-0 before"),
        (
            {},
            {"itl_excess_s": 0.012},
            "because gaps between tokens at prefill-1 -> decode-0 would exceed the SLO by 12 ms",
        ),
        (
            {"cost_s": 0.01},
            {"load": 0.5},
            "for the least predicted cost: 10 ms, against 30 ms at prefill-1 -> decode-0",
        ),
        (
            {"cost_s": 0.01},
            {"decode_worker": "prefill-1"},
            "for the least predicted cost: 10 ms, against 30 ms at prefill-1 for both phases",
        ),
        ({"load": 0.25}, {"load": 0.5}, "for the lower load: 25%, against 50% at prefill-1 -> decode-0"),
        ({}, {}, "by name: prefill-1 -> decode-0 was as good"),
    ],
)
def test_explain_names_the_first_thing_in_which_a_place_was_better(
    chosen: dict[str, Any], following: dict[str, Any], why: str
) -> None:
    even: dict[str, Any] = {"decode_worker": "decode-0", "cost_s": 0.03}
    places = [
        pb.ConsideredPlace(**({"prefill_worker": name} | even | scores))
        for name, scores in (("prefill-0", chosen), ("prefill-1", following))
    ]
    explanation = pb.Explanation(attempts=[pb.ExplainedAttempt(considered=places)])
    assert f"  placed there {why}" in list(explanation_lines(explanation))


def test_apply_names_the_drained_workers_that_it_replaces(
    run: Run, server: ServerThread, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(config_yaml())
    before = cluster.state.workers
    drained = (before[0], replace(before[1], state=WorkerState.DRAINED))
    server.call(lambda: cluster.change(workers=drained))
    assert run("apply", str(file), "--dry-run").stdout == "decode-0: drained -> would be replaced\n"
    cluster.on_apply = lambda: cluster.change(workers=before)
    assert run("apply", str(file)).stdout == "decode-0: drained -> replaced\n"


def test_apply_waits_until_every_instance_is_ready(
    run: Run, server: ServerThread, cluster: ScriptedCluster, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(config_yaml())
    ready = tuple(replace(worker, state=WorkerState.READY) for worker in cluster.state.workers)
    cluster.on_watch = lambda: cluster.change(workers=ready)
    result = run("apply", str(file), "--wait")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "nothing to change"
    assert result.stdout.splitlines()[-1] == "decode-0: ready"


def test_apply_prints_each_change(run: Run, cluster: ScriptedCluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(config_yaml(pools="{decode: {instances: 2}}"))
    assert run("apply", str(file), "--dry-run").stdout == "pools.decode.instances: 1 -> 2\n"
    assert cluster.applied == []
    assert run("apply", str(file)).stdout == "pools.decode.instances: 1 -> 2\n"
    assert run("apply", str(file)).stdout == "nothing to change\n"
    file.write_text(config_yaml(kv="{block_size: 32}"))
    result = run("apply", str(file))
    assert result.exit_code == 1
    assert "kv.block_size" in result.stderr


def test_scale_changes_pools_to_a_number_or_by_one(run: Run, cluster: ScriptedCluster) -> None:
    assert run("scale", "prefill=3", "decode=+1", "--dry-run").stdout.splitlines() == [
        "pools.prefill.instances: 1 -> 3",
        "pools.decode.instances: 1 -> 2",
    ]
    assert cluster.applied == []
    assert run("scale", "decode=+1").stdout == "pools.decode.instances: 1 -> 2\n"
    assert run("scale", "--", "decode=-1").stdout == "pools.decode.instances: 2 -> 1\n"
    assert run("scale", "decode=1").stdout == "nothing to change\n"


@pytest.mark.parametrize(
    "text", ["decode", "decode=", "decode=some", "=3", "decode=1.5", "decode=+", "decode=²"]
)
def test_a_change_of_scale_that_is_none_is_refused(run: Run, text: str, cluster: ScriptedCluster) -> None:
    result = run("scale", text)
    assert result.exit_code == 1
    assert f"{text!r}: expected a pool and its instances, such as prefill=3 or decode=+1" in result.stderr
    assert cluster.applied == []


def test_drain_waits_until_workers_are_idle(run: Run, server: ServerThread, cluster: ScriptedCluster) -> None:
    server.call(cluster.go_on.set)
    result = run("drain", "prefill-0")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "drained"
    assert cluster.drained == [(("prefill-0",), False)]


def test_down_returns_when_nothing_answers_any_more(
    run: Run, server: ServerThread, cluster: ScriptedCluster
) -> None:
    server.stop_when_shut_down()
    server.call(cluster.go_on.set)
    result = run("down")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "stopped")
    assert cluster.drained == [((), True)]


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"pdserve {__version__}\n"
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


def test_a_client_command_loads_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['pdserve', 'status', '--address', '127.0.0.1:1']\n"
        "try:\n    from pdserve.cli.entry import main; main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_validate_and_plan_report_a_files_requirements(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("metadata: {pdserve: {pools: {decode: {instances: 4000}}}}\n")
    result = run("validate", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: valid\n")
    assert result.stderr.startswith("on this machine: ")
    planned = run("plan", str(file))
    assert planned.exit_code == 1
    assert "KV cache" in planned.stdout
    assert "cores" in planned.stderr
    as_json = json.loads(run("plan", str(file), "-o", "json").stdout)
    assert [pool["role"] for pool in as_json["pools"]] == ["prefill", "decode"]
    assert as_json["findings"]


def test_validate_finds_a_tokenizer_that_was_made_to_do_harm(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    doubling = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": doubling}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = tmp_path / "cluster.yaml"
    file.write_text(f"metadata: {{pdserve: {{model: {{path: {model}}}}}}}\n")
    result = run("validate", str(file))
    assert result.exit_code == 1
    assert f"{model}: its tokenizer cannot be loaded: its normalizer" in result.stderr


def test_validate_refuses_an_unservable_configuration(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("metadata:\n  pdserve:\n    pools: {decode: {instances: many}}\n")
    result = run("validate", str(file))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"pdserve: {file}:3: metadata.pdserve.pools.decode.instances: got 'many'")
