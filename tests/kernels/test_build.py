import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.kernels import build

SOURCE = 'extern "C" int pd_portable_one() { return 1; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels of one line, which compile at once."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path / "native"
    folder.mkdir()
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "LEVELS", {platform.machine(): {"portable": []}})
    monkeypatch.setattr(build, "_BASELINE", ("cpu.cpp",))
    monkeypatch.setattr(build, "_LEVEL", ("linear.cpp",))
    (folder / "cpu.cpp").touch()
    (folder / "linear.cpp").write_text(SOURCE)
    (folder / "simd.h").touch()
    return folder


@pytest.fixture
def compiles(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Builds the library, and tells whether that took the compiler."""
    compile_library, calls = build.compile_library, []

    def counted(*arguments: object) -> Path:
        calls.append(arguments)
        return compile_library(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "compile_library", counted)

    def call() -> bool:
        calls.clear()
        assert build.build(tmp_path) == [tmp_path / build.LIBRARY_NAME]
        return bool(calls)

    return call


def test_an_unchanged_library_is_not_compiled_again(compiles: Callable[[], bool], tmp_path: Path) -> None:
    assert compiles()
    built = (tmp_path / build.LIBRARY_NAME).read_bytes()
    assert not compiles()
    assert (tmp_path / build.LIBRARY_NAME).read_bytes() == built


@pytest.mark.parametrize("name", ["linear.cpp", "simd.h"])
def test_a_changed_source_is_compiled(compiles: Callable[[], bool], sources: Path, name: str) -> None:
    assert compiles()
    with (sources / name).open("a") as file:
        file.write("// changed\n")
    assert compiles()


def test_another_compiler_compiles(
    compiles: Callable[[], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiles()
    other = tmp_path / "g++"
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo other\nexec {shutil.which("g++")} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert compiles()


def test_a_library_of_another_make_is_replaced(compiles: Callable[[], bool], tmp_path: Path) -> None:
    (tmp_path / build.LIBRARY_NAME).write_bytes(b"another")
    assert compiles()
