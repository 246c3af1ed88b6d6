"""Compiles the native CPU kernels; called by the package's build, by file path, before anything is installed.

The library has a plain C interface and needs neither torch nor Python headers. It holds the kernels once for
each level of instruction set, under names of its own; the loader asks the CPU it runs on which of them may
run. Nothing depends on the building machine but its architecture."""

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARY_NAME = "libpdserve_kernels.so"

SOURCES = Path(__file__).resolve().parent / "native"
_BASELINE = ("cpu.cpp", "pool.cpp", "ranks.cpp")  # run on every CPU
_LEVEL = ("linear.cpp", "attention.cpp", "rowwise.cpp", "transfer.cpp")  # compiled for each level
# Products and sums are fused where the source says so and nowhere else: the same sums in every kernel.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
TILE_MODEL = [*_AVX512_BF16, "-DPD_TILES=2"]  # amx with its tiles in software, for tests
LEVELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "x86_64": {
        "portable": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": _AVX512,
        "avx512_bf16": _AVX512_BF16,
        "amx": [*_AVX512_BF16, "-DPD_TILES=1"],
    },
    "aarch64": {"portable": []},
}


def build(out_dir: Path) -> list[Path]:
    """Compiles the library into `out_dir`, unless it is there; returns its files, none without a compiler for
    this platform."""
    compiler, machine = shutil.which("g++") or shutil.which("c++"), platform.machine()
    if sys.platform != "linux" or machine not in LEVELS or compiler is None:
        return []
    library, build_id = out_dir / LIBRARY_NAME, _build_id(compiler)
    if library.is_file() and build_id in library.read_bytes():
        return [library]
    objcopy = shutil.which("objcopy") or "objcopy"
    with tempfile.TemporaryDirectory() as tmp:
        linked = compile_library([compiler], objcopy, LEVELS[machine], Path(tmp), build_id)
        # A rename puts the new library in place at once; processes that have the old one mapped keep it.
        staged = library.with_suffix(".tmp")
        shutil.copyfile(linked, staged)
        staged.replace(library)
    return [library]


def _build_id(compiler: str) -> bytes:
    """Returns a digest of the sources, of this file with its flags, and of the compiler's version."""
    version = subprocess.run([compiler, "--version"], check=True, stdout=subprocess.PIPE).stdout
    digest = hashlib.sha256(version)
    for source in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(hashlib.sha256(source.read_bytes()).digest() + source.name.encode())
    return digest.digest()


def compile_library(
    compiler: Sequence[str],
    objcopy: str,
    levels: Mapping[str, Sequence[str]],
    tmp: Path,
    build_id: bytes = bytes(32),
) -> Path:
    """Compiles the library with the given levels and their flags, by way of `tmp`; returns its path there."""
    compiles = [_compile(compiler, source, [], tmp / source) for source in _BASELINE]
    for level, flags in levels.items():
        (tmp / level).mkdir()
        flags = [*flags, f"-DPD_LEVEL={level}"]
        compiles += [_compile(compiler, source, flags, tmp / level / source) for source in _LEVEL]
    exit_codes = [process.wait() for process in compiles]
    if any(exit_codes):
        raise RuntimeError("the native kernels do not compile; see the compiler's messages above")
    for level in levels:
        objects = [str((tmp / level / source).with_suffix(".o")) for source in _LEVEL]
        _isolate(compiler, objcopy, level, objects, tmp / f"{level}.o")
    linked = tmp / LIBRARY_NAME
    link = [*compiler, "-shared", "-static-libstdc++", "-static-libgcc", "-pthread", "-o", str(linked)]
    link.append(f"-Wl,--build-id=0x{build_id.hex()}")
    subprocess.run([*link, *(str(out) for out in sorted(tmp.glob("*.o")))], check=True)
    return linked


def _compile(
    compiler: Sequence[str], source: str, flags: Sequence[str], out: Path
) -> "subprocess.Popen[bytes]":
    command = [*compiler, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(out.with_suffix(".o"))]
    return subprocess.Popen(command)


def _isolate(compiler: Sequence[str], objcopy: str, level: str, objects: Sequence[str], out: Path) -> None:
    """Joins a level's objects and hides all of them but its entry points.

    Else the linker would keep one copy of an inline function, of the standard library say, for all levels,
    and a plain CPU would run the one that was compiled for AVX-512."""
    join = [*compiler, "-r", "-nostdlib", "-Wl,--force-group-allocation", "-o", str(out), *objects]
    subprocess.run(join, check=True)
    hide = [objcopy, "--wildcard", f"--keep-global-symbol=pd_{level}_*", str(out)]
    subprocess.run(hide, check=True)


if __name__ == "__main__":
    print(*build(Path(__file__).resolve().parent))
