"""Worker side of the gray faults: makes a worker fail its sends, or die of a request. Python runs `install`
at the start of each process of a cluster under test (see `gray.py`); the product has no such hook.

The switches are files in a folder, named by the worker's process:

    gather.<pid>    the worker cannot read its KV blocks
    send.<pid>      each link breaks at its first chunk
    failed.<pid>    written by the worker: one byte for each call that failed on purpose
    death.<pid>     written by the worker: it dies of this request
"""

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

FOLDER = "PDSERVE_ORDEAL_GRAY"  # the variable that names it
TARGET = "pdserve.worker.process"  # no other process of a cluster imports it
SendFault = Literal["gather", "send"]
_DEADLY = re.compile(r"(?:[\w-]+/)?deadly after (\d+)/")  # behind the name of a key


def deadly_name(num_tokens: int, name: str) -> str:
    """Names a request that kills each worker that computes it once it has so many tokens of output."""
    return f"deadly after {num_tokens}/{name}"


def is_deadly(request_id: str, num_output_tokens: int) -> bool:
    found = _DEADLY.match(request_id)
    return found is not None and num_output_tokens >= int(found[1])


def install() -> None:
    """Takes effect in a process that becomes a worker, when it imports its code."""
    sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None and spec.loader is not None
        spec.loader = _Patching(spec.loader)
        return spec


class _Patching(Loader):
    """Loads a module as its own loader does, and patches the worker's classes, which it has imported."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        patch(Path(os.environ[FOLDER]))


def patch(folder: Path) -> None:
    """Makes this process obey the switches in the folder."""
    from pdserve.engine.kv_cache import KVCache
    from pdserve.kv_transfer.gloo import GlooLink
    from pdserve.kv_transfer.link import PeerLost
    from pdserve.kv_transfer.shm import ShmLink
    from pdserve.worker.step_watch import WatchedRunner

    _fail(KVCache, "gather", folder, OSError)
    for link in (ShmLink, GlooLink):
        _fail(link, "send", folder, PeerLost)
    launch = WatchedRunner.launch

    @wraps(launch)
    def launch_or_die(self: WatchedRunner, batch: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in batch.chunks:
            request_id = chunk.sequence.transfer.request_id
            if is_deadly(request_id, chunk.sequence.num_output_tokens):
                report = folder / f"writing.{os.getpid()}"
                report.write_text(f"{time.monotonic()} {request_id}")
                report.rename(folder / f"death.{os.getpid()}")
                os.kill(os.getpid(), signal.SIGKILL)
        return launch(self, batch, *args, **kwargs)

    WatchedRunner.launch = launch_or_die  # type: ignore[method-assign]


def _fail(owner: type, method: SendFault, folder: Path, error: type[Exception]) -> None:
    """Makes the method raise as long as its switch exists."""
    works = getattr(owner, method)
    switch, failed = folder / f"{method}.{os.getpid()}", folder / f"failed.{os.getpid()}"

    @wraps(works)
    def fail_or_work(*args: Any, **kwargs: Any) -> Any:
        if switch.exists():
            with failed.open("ab") as file:
                file.write(b".")
            raise error(f"{method} fails on purpose")
        return works(*args, **kwargs)

    setattr(owner, method, fail_or_work)
