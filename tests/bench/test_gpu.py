"""The GPU benchmark's correctness half, in Triton's interpreter; what fails there fails the run."""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.comparison.peers.protocol import RunTimes
from bench.gpu import (
    __main__ as command,
    attention_checks,
    checks,
    interpreter,
    kernel_checks,
    sampling_checks,
    wire_checks,
)
from bench.gpu.apart import Program
from bench.gpu.cases import Case
from bench.gpu.report import (
    Begun,
    Broken,
    Check,
    Limit,
    Message,
    Note,
    NotRun,
    Row,
    at_least,
    is_correct,
    received,
    send,
    summary,
)
from bench.gpu.sections import CORRECTNESS, Context, Section, run_here
from bench.gpu.serving import steady_step
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, QWEN3_06B
from bench.gpu.throughput import nano_requests
from pdserve.kernels.triton.launch import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="toy sizes are for Triton's interpreter")


def run_interpreted(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.gpu", "--interpret", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"correctness: (\d+) of \1 checks passed", done.stdout)
    assert "BROKEN" not in done.stdout
    return done.stdout


def test_every_kernel_and_a_whole_engine_are_right_in_the_interpreter() -> None:
    run_interpreted()


@pytest.fixture(scope="module")
def diagnosis() -> str:
    return run_interpreted("--only", "sweep", "profile")


def test_every_sweep_variant_computes_the_same_and_names_gpu_needs(diagnosis: str) -> None:
    assert re.search(r"decode attention.*tile of 128 keys +needs a GPU", diagnosis)
    assert re.search(r"chunks of .* MiB, exposed +needs a GPU", diagnosis)


def test_the_profile_ends_with_the_gaps_between_kernels(diagnosis: str) -> None:
    assert "gaps between kernels" in diagnosis


def one_element(
    change: Callable[[torch.Tensor], torch.Tensor | float], real: Callable[..., Any]
) -> Callable[..., Any]:
    """`real`, but for one element of what it returns."""

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = real(*args, **kwargs)
        out.view(-1)[-1] = change(out.view(-1)[-1])
        return out

    return broken


def stale_graph(self: Any) -> None:
    """A graph that looks where nothing is put any more."""


BREAKAGES = [  # where, what, its replacement, the checks that must notice
    (kernel_checks, "silu_mul", one_element(lambda x: x + 1.0, kernel_checks.silu_mul), "silu"),
    (kernel_checks, "rms_norm", one_element(lambda x: math.nan, kernel_checks.rms_norm), "norm"),
    (
        kernel_checks,
        "add_rms_norm",
        one_element(lambda x: x + 1.0, kernel_checks.add_rms_norm),
        "with residual",
    ),
    (kernel_checks, "rope_and_cache", lambda *args: torch.zeros(5, args[0].shape[1] // 2), "rope"),
    (
        kernel_checks.TritonKernels,
        "linear",
        one_element(lambda x: x + 1e3, kernel_checks.TritonKernels.linear),
        "logits",
    ),
    (
        attention_checks.TritonKernels,
        "paged_attention",
        one_element(lambda x: x + 1.0, attention_checks.TritonKernels.paged_attention),
        "attention",
    ),
    (
        attention_checks.HostDevice,
        "capture",
        lambda self, work: type("Graph", (), {"replay": stale_graph})(),
        "captured",
    ),
    (sampling_checks, "sample", one_element(lambda x: x + 1, sampling_checks.sample), "sampling"),
    (sampling_checks, "mask_tokens", lambda logits, rows, bits: None, "masks"),
    (wire_checks.transfer, "checksum", one_element(lambda x: x + 1, wire_checks.transfer.checksum), "gather"),
    (
        wire_checks.transfer,
        "scatter_part",
        lambda cache, *rest: wire_checks.transfer.checksum(rest[2]),
        "gather",
    ),
]


@interpreted
@pytest.mark.parametrize(("where", "what", "replacement", "noticing"), BREAKAGES)
def test_a_broken_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, where: Any, what: str, replacement: Callable[..., Any], noticing: str
) -> None:
    monkeypatch.setattr(where, what, replacement)
    outcomes = [
        checks.checked(case) for case in kernel_checks.all_cases("cpu", is_toy=True) if noticing in case.name
    ]
    assert not all(isinstance(outcome, Check) and outcome.ok for outcome in outcomes)


@interpreted
def test_a_broken_kernel_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_in_process(sections: list[Section], program: Program, stderr_folder: Path) -> Iterator[Message]:
        for section in sections:
            sent: list[Message | Begun] = []
            run_here(section, Context(sent.append, program.interpret, only_check="silu"))
            yield from (message for message in sent if not isinstance(message, Begun))

    monkeypatch.setattr(command, "run_side_by_side", run_in_process)
    monkeypatch.setattr(sys, "argv", ["gpu", "--interpret", "--only", "kernels"])
    assert command.main() == 0
    monkeypatch.setattr(kernel_checks, "silu_mul", one_element(lambda x: x + 1.0, kernel_checks.silu_mul))
    assert command.main() == 1
    assert "FAILED silu" in capsys.readouterr().out


def test_a_check_for_which_there_was_no_time_has_not_passed() -> None:
    messages: list[Message | Begun] = []
    kernel_checks.check(Context(messages.append, interpret=True, ends_s=0.0))
    assert messages
    assert all(isinstance(message, Check) and not message.ok for message in messages)
    assert len({message.name for message in messages if isinstance(message, Check)}) == len(messages)


def test_checks_are_alike_however_many_have_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed check can thus be run alone."""
    case = Case("drawn", math.inf, lambda: float(torch.rand(())))
    first = checks.checked(case)
    torch.rand(7)
    assert checks.checked(case) == first


def test_an_interpreter_that_does_not_work_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index() -> float:
        return float(int([1]))  # type: ignore[call-overload]

    monkeypatch.setattr(interpreter, "is_broken", lambda: True)
    outcome = checks.checked(Case("loops", 0.0, no_index))
    assert isinstance(outcome, NotRun)
    assert is_correct([outcome], CORRECTNESS)
    assert f"0 of 0 checks passed, 1 not run: {interpreter.why()}" in summary([outcome])
    monkeypatch.setattr(interpreter, "is_broken", lambda: False)
    assert isinstance(checks.checked(Case("loops", 0.0, no_index)), Check)


@interpreted
def test_this_interpreter_works() -> None:
    assert not interpreter.is_broken()


def test_only_correctness_decides_the_exit_status() -> None:
    missed = Row("decode", "1 ms", "50.0%", ">= 90%", False)
    assert is_correct([Check("a", 0.1, 0.2), missed, Broken("transfer", "no GPU")], CORRECTNESS)
    for wrong in (
        Check("b", math.nan, 0.2),
        Check("c", 0.3, 0.2),
        Check("d", 0.0, 0.2, "raised"),
        Broken("engine", "?"),
    ):
        assert not is_correct([Check("a", 0.1, 0.2), wrong], CORRECTNESS)


def test_messages_arrive_as_they_were_sent(tmp_path: Path) -> None:
    messages: list[Message | Begun] = [
        Check("a", 0.5, 1.0),
        Limit("copy", 3e12, "3 TB/s"),
        Row("x", "1 ms"),
        Broken("s", "why"),
        Note("n"),
        Begun("b"),
    ]
    with (tmp_path / "messages").open("w") as file:
        for message in messages:
            send(message, file)
    assert [received(line) for line in (tmp_path / "messages").read_text().splitlines()] == messages


def test_the_table_shows_targets_reached_and_missed() -> None:
    rows = [at_least("decode", "1 ms", 0.93, 0.9, "copy"), at_least("prefill", "2 ms", 0.5, 0.65, "product")]
    text = summary(
        [Check("a", 3.0, 1.0), Broken("transfer", "no link"), Limit("copy", 3e12, "3 TB/s"), *rows]
    )
    assert "0 of 1 checks passed" in text
    assert "FAILED a: error 3, at most 1" in text
    assert "BROKEN transfer: no link" in text
    assert [line.split()[-1] for line in text.splitlines()[-2:]] == ["OK", "missed"]


def test_a_share_of_an_unknown_limit_is_missed() -> None:
    assert at_least("decode", "1 ms", Context(print).share("copy", 1e12), 0.9, "copy").ok is False


def test_the_requests_are_nano_vllms() -> None:
    requests = nano_requests()
    assert len(requests) == 256
    assert sum(request.num_new_tokens for request in requests) == 133_966


@pytest.mark.parametrize(
    ("shape", "gigabytes", "kv_bytes"),
    [(LLAMA_8B, 15.01, 131_072), (LLAMA_1B, 2.47, 32_768), (QWEN3_06B, 1.19, 114_688)],
)
def test_a_step_reads_the_weights_and_the_contexts(shape: Any, gigabytes: float, kv_bytes: int) -> None:
    assert round(shape.step_bytes(0) / 1e9, 2) == gigabytes
    assert shape.step_bytes(1000) - shape.step_bytes(0) == 1000 * kv_bytes


def test_a_steady_step_is_one_in_which_all_decode() -> None:
    """One sequence starts late; later steps take 2 s, earlier ones 5."""
    early, late = [5.0 * i for i in range(20)], [100.0 + 2.0 * i for i in range(41)]
    step_s, mean_length = steady_step(RunTimes(0.0, (tuple(early + late), tuple(late))))
    assert step_s == 2.0
    assert 31 + 10 <= mean_length <= 31 + 12
