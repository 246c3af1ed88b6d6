"""The GPU benchmark's division of time, and the results kept when a section's process ends early. Small
programs stand in for the sections' processes."""

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from bench.gpu import __main__ as command, apart
from bench.gpu.apart import Program, run_apart, run_side_by_side
from bench.gpu.record import Record
from bench.gpu.report import Broken, Check, Message, Note, Row, is_correct
from bench.gpu.sections import BY_NAME, CORRECTNESS, GPU_LOST, SECTIONS, Section

KERNELS = replace(BY_NAME["kernels"], budget_s=60.0)
PREAMBLE = """
import argparse, os, sys, time
from bench.gpu.report import Begun, Broken, Check, Note, send
parser = argparse.ArgumentParser()
for name in ("--section", "--limits", "--budget-s", "--first-check", "--case"):
    parser.add_argument(name)
args = parser.parse_args()
first = int(args.first_check)

def check(number):
    if number >= first:
        send(Begun(f"check {number}"), sys.stdout)
        print("at", number, file=sys.stderr, flush=True)
        return True
    return False

def passed(number):
    send(Check(f"check {number}", 0.0, 0.0), sys.stdout)
"""

Write = Callable[[str], Program]


@pytest.fixture
def program(tmp_path: Path) -> Write:
    def write(body: str) -> Program:
        path = tmp_path / "section.py"
        path.write_text(PREAMBLE + textwrap.dedent(body))
        return Program(path)

    return write


def test_a_check_that_crashes_its_process_fails_and_later_checks_run(program: Write, tmp_path: Path) -> None:
    killed_by_the_second = program("""
        for number in range(4):
            if check(number):
                if number == 1:
                    os.kill(os.getpid(), 6)
                passed(number)
    """)
    messages = list(run_apart(KERNELS, killed_by_the_second, tmp_path))
    assert [(message.name, message.ok) for message in messages if isinstance(message, Check)] == [
        ("check 0", True),
        ("check 1", False),
        ("check 2", True),
        ("check 3", True),
    ]
    assert len(messages) == 4
    assert not is_correct(messages, CORRECTNESS)


def test_a_section_continues_in_a_new_process_after_losing_the_gpu(program: Write, tmp_path: Path) -> None:
    lost_after_the_first = program(f"""
        for number in range(3):
            if check(number):
                send(Check(f"check {{number}}", float("nan"), 0.0, f"CUDA error in {{os.getpid()}}"), sys.stdout)
                if number == 0:
                    os._exit({GPU_LOST})
    """)
    messages = list(run_apart(KERNELS, lost_after_the_first, tmp_path))
    problems = [message.problem for message in messages if isinstance(message, Check)]
    assert len(messages) == len(problems) == 3
    assert problems[0] != problems[1] == problems[2]


def test_a_process_that_ends_before_its_first_check_is_not_restarted(program: Write, tmp_path: Path) -> None:
    messages = list(run_apart(KERNELS, program(f"os._exit({GPU_LOST})"), tmp_path))
    assert messages == [Broken("kernels", f"its process ended with status {GPU_LOST}")]


def test_a_section_over_its_time_is_ended_and_fails(program: Write, tmp_path: Path) -> None:
    waits = program("time.sleep(600)")
    messages = list(run_apart(replace(KERNELS, budget_s=0.01), waits, tmp_path))
    assert messages == [Broken("kernels", "not done after 0.01 s")]
    assert not is_correct(messages, CORRECTNESS)


def test_a_check_that_hangs_leaves_time_for_the_next_ones(
    program: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_SHARE_OF_A_CHECK", 0.01)
    hangs_in_the_first = program("""
        for number in range(2):
            if check(number):
                if number == 0:
                    time.sleep(600)
                passed(number)
    """)
    messages = list(run_apart(replace(KERNELS, budget_s=200.0), hangs_in_the_first, tmp_path))
    first, second = messages
    assert isinstance(first, Check)
    assert first.problem == "not done after 2 s"
    assert second == Check("check 1", 0.0, 0.0)


def test_a_sections_standard_error_is_kept_whole(program: Write, tmp_path: Path) -> None:
    """This includes failed checks that did not end it, and all of its processes."""
    writes = program("""
        for number in range(60):
            if check(number):
                if number == 30:
                    os._exit(1)
                passed(number)
    """)
    list(run_apart(KERNELS, writes, tmp_path))
    assert (tmp_path / "kernels.txt").read_text().split() == [
        word for number in range(60) for word in ("at", str(number))
    ]


def test_sections_side_by_side_wait_for_each_other_s_messages_only(program: Write, tmp_path: Path) -> None:
    """Each sees the other's mark before it ends, so both run at once."""
    meets = program("""
        from pathlib import Path
        here = Path(__file__).parent
        (here / args.section).touch()
        other = "engine" if args.section == "kernels" else "kernels"
        while not (here / other).exists():
            time.sleep(0.01)
        send(Note(args.section), sys.stdout)
    """)
    both = [replace(BY_NAME[name], budget_s=60.0) for name in ("kernels", "engine")]
    messages = list(run_side_by_side(both, meets, tmp_path))
    assert sorted(message.text for message in messages if isinstance(message, Note)) == ["engine", "kernels"]
    assert len(messages) == 2


def test_only_correctness_runs_side_by_side() -> None:
    names = [[section.name for section in group] for group in command.parts(SECTIONS)]
    assert [group for group in names if len(group) > 1] == [["kernels", "engine"]]
    assert [name for group in names for name in group] == [section.name for section in SECTIONS]


def test_budgets_end_with_the_run() -> None:
    kernels, engine = BY_NAME["kernels"], BY_NAME["engine"]
    assert (kernels.budget_s, engine.budget_s) == (90, 70)
    assert command.within([kernels, engine], 500.0) == [kernels, engine]
    assert [each.budget_s for each in command.within([kernels, engine], 80.0)] == [80, 70]
    assert command.within([kernels, engine], 1.0) == []


def test_the_interpreter_and_a_sanitizer_have_as_long_as_the_run() -> None:
    for sections in (
        command.chosen(None, interpret=True),
        command.chosen(["kernels", "attention"], is_patient=True),
    ):
        assert {each.budget_s for each in command.within(sections, 500.0)} == {500.0}


def test_sections_run_in_the_order_in_which_they_are_named() -> None:
    """Measurements run after the limits that they refer to."""
    named = command.chosen(["engine", "profile", "attention"])
    assert [section.name for section in named] == ["engine", "limits", "profile", "attention"]
    named = command.chosen(["attention", "limits"])
    assert [section.name for section in named] == ["attention", "limits"]
    assert [section.name for section in command.chosen(None, interpret=True)] == ["kernels", "engine"]
    asked_for = {section.name for section in command.chosen(None)}
    assert asked_for == {section.name for section in SECTIONS} - {"sweep", "profile"}


def test_an_interrupted_run_keeps_its_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut_off_in_the_second(
        sections: list[Section], program: Program, stderr_folder: Path
    ) -> Iterator[Message]:
        if sections[0].name == "attention":
            raise KeyboardInterrupt
        yield Row("copied", "4 TB/s")

    monkeypatch.setattr(command, "run_side_by_side", cut_off_in_the_second)
    record = Record(tmp_path, "python -m bench.gpu")
    with pytest.raises(KeyboardInterrupt):
        command.run([BY_NAME["limits"], BY_NAME["attention"]], Program(Path("none")), record, 100.0)
    assert re.search(r"copied +4 TB/s", record.table.read_text())
    assert "s up to limits" in record.table.read_text()


def test_sections_without_time_are_skipped_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = Event()
    monkeypatch.setattr(command, "run_side_by_side", lambda *_: begun.set())
    record = Record(tmp_path, "python -m bench.gpu")
    messages = command.run([BY_NAME["kernels"], BY_NAME["attention"]], Program(Path("none")), record, 0.1)
    assert not begun.is_set()
    assert [message.section for message in messages if isinstance(message, Broken)] == [
        "kernels",
        "attention",
    ]
    assert not is_correct(messages, CORRECTNESS)
