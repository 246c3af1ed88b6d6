"""Compiles the native CPU kernels; called by the package's build, by file path, before anything is installed.

The library has a plain C interface and needs neither torch nor Python headers. It is compiled for explicit
instruction sets, not for the building machine; the loader asks the CPU it runs on."""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY_NAME = "libpdserve_kernels.so"

_SOURCES = Path(__file__).resolve().parent / "native"
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=default"]
_VECTOR_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"]
_BASELINE_SOURCES = {"cpu.cpp"}  # queries the CPU's features, so it must run on any CPU


def build(out_dir: Path) -> list[Path]:
    """Compiles the library into `out_dir`; returns the files it created, none without a compiler for this
    platform."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        return []
    library = out_dir / LIBRARY_NAME
    with tempfile.TemporaryDirectory() as tmp:
        objects = [(source, Path(tmp) / f"{source.stem}.o") for source in sorted(_SOURCES.glob("*.cpp"))]
        compiles = [subprocess.Popen(_compile_command(compiler, source, out)) for source, out in objects]
        exit_codes = [process.wait() for process in compiles]
        if any(exit_codes):
            raise RuntimeError("the native kernels do not compile; see the compiler's messages above")
        linked = Path(tmp) / LIBRARY_NAME
        link = [compiler, "-shared", "-static-libstdc++", "-static-libgcc", "-pthread", "-o", str(linked)]
        subprocess.run([*link, *(str(out) for _, out in objects)], check=True)
        # A rename puts the new library in place at once; processes that have the old one mapped keep it.
        staged = library.with_suffix(".tmp")
        shutil.copyfile(linked, staged)
        staged.replace(library)
    return [library]


def _compile_command(compiler: str, source: Path, out: Path) -> list[str]:
    vector_flags = [] if source.name in _BASELINE_SOURCES else _VECTOR_FLAGS
    return [compiler, *_FLAGS, *vector_flags, "-c", str(source), "-o", str(out)]


if __name__ == "__main__":
    print(*build(Path(__file__).resolve().parent))
