"""The script that a GPU's minutes are spent by. In the benchmark's place stands a program that notes how it
was called."""

import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "gpu_day"
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *bench.gpu*)
        echo "$@" > "$NOTES/arguments"
        cp -r "$TRITON_CACHE_DIR" "$NOTES/cache"
        {sys.executable} -c 'import carried; print(carried.__file__)' > "$NOTES/carried" 2>&1
        touch "$TRITON_CACHE_DIR/kernel-of-$CALL"
        exit 1
        ;;
    "-c import msgspec") exit "${{LACKS_MSGSPEC:-0}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def day(tmp_path: Path) -> "Day":
    return Day(tmp_path)


class Day:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def call(self, name: str, *arguments: str, **environment: str) -> int:
        self.notes = self.folder / f"notes-{name}"
        self.notes.mkdir()
        there = {
            "PYTHON": str(self.python),
            "NOTES": str(self.notes),
            "CALL": name,
            "TMPDIR": str(self.folder),
        }
        command = [str(SCRIPT), name, "--out", str(self.folder / name), *arguments]
        done = subprocess.run(
            command, env=os.environ | there | environment, capture_output=True, text=True, check=False
        )
        return done.returncode

    @property
    def bench_arguments(self) -> list[str]:
        return (self.notes / "arguments").read_text().split()


def test_the_cache_survives_a_failed_call(day: Day) -> None:
    assert day.call("first") == 1
    tar = day.folder / "first" / "triton-cache.tar"
    with tarfile.open(tar) as archive:
        assert "./kernel-of-first" in archive.getnames()
    assert day.call("second", "--cache", str(tar)) == 1
    assert [path.name for path in (day.notes / "cache").iterdir()] == ["kernel-of-first"]
    with tarfile.open(day.folder / "second" / "triton-cache.tar") as archive:
        assert {"./kernel-of-first", "./kernel-of-second"} <= set(archive.getnames())
    assert not list(day.folder.glob("tmp.*"))  # nothing else is left


def test_the_first_call_checks_and_the_second_diagnoses(day: Day) -> None:
    day.call("first")
    first = day.bench_arguments
    assert first[first.index("--only") + 1 :] == [
        "kernels",
        "engine",
        "limits",
        "attention",
        "transfer",
        "llama-8b",
        "llama-1b",
    ]
    assert "--no-peers" in first
    day.call("second", "--changed", "decode", "--again", "llama-8b", "transfer", "--total-s", "200")
    second = day.bench_arguments
    assert second[second.index("--only") + 1 :] == [
        *("kernels", "limits", "sweep", "profile", "qwen3-0.6b"),
        *("llama-8b", "transfer", "attention"),
    ]
    assert second[second.index("--case") + 1] == "decode"
    assert second[second.index("--total-s") + 1] == "200"


def test_missing_packages_are_installed_from_the_supplied_wheels(day: Day) -> None:
    wheels = day.folder / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
    day.call("first", "--wheels", str(wheels), LACKS_MSGSPEC="1")
    assert (day.notes / "carried").read_text().strip().endswith("carried.py")


def test_an_unknown_call_is_refused() -> None:
    done = subprocess.run([str(SCRIPT), "third", "--out", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "first --out DIR" in done.stderr
