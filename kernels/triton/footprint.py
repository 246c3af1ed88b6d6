"""Compiles a launch to machine code for a GPU that need not be present, and reports the multiprocessor
resources that it takes.

Specialises like Triton's own launcher (alignment, constants), by that launcher's code: hence the private
names."""

import contextlib
import hashlib
import io
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import INTERPRETED, Launch

_WARP_SIZE = 32


def source_digest() -> str:
    """Returns a digest of everything here, from which the launches and their code follow."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


@dataclass(frozen=True)
class Footprint:
    """The resources of one block of threads."""

    kernel: str
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill_bytes: int  # stored and loaded by a thread
    shared_bytes: int


def footprint(launch: Launch, target: int) -> Footprint:
    """Compiles for compute capability `target`, 90 for 9.0. Raises the errors of Triton and ptxas."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile")
    gpu = GPUTarget("cuda", target, _WARP_SIZE)
    backend = make_backend(gpu)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    arguments, specialization, options = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options, arguments, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    log = io.StringIO()
    # A compiler's cache hit has no log, so every compilation is into a cache of its own.
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    name = launch.kernel.__name__.removeprefix("_")
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())))
    registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())))
    return Footprint(name, launch.num_warps, launch.num_stages, registers, spilled, compiled.metadata.shared)
