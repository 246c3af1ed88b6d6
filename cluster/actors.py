"""The Ray actors: thin hosts of a worker process and of the head. Everything inside is loaded in the actor's own process."""

import importlib
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..core.errors import PdserveError
from .worker_spec import WorkerSpec

HEAD_NAME = "pdserve-head"
NAMESPACE = "pdserve"


def load_entry_point(name: str) -> Any:
    """The object that `package.module:name` means."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def reason_of(error: RayError) -> str:
    """Why an actor ended, or a call of it failed, in one line unless it is a message of ours."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return str(error.cause) if isinstance(error.cause, PdserveError) else f"{type(error.cause).__name__}: {error.cause}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    began = not (isinstance(error, RayActorError) and error.actor_init_failed)
    return lines[0] if began else f"the process did not start: {lines[-1]}"


@ray.remote(max_restarts=0, max_concurrency=2)
class WorkerActor:
    """Hosts one worker. `run` occupies one of the actor's threads for as long as the worker lives, `stop` needs the other."""

    def __init__(self, entry_point: str, spec: WorkerSpec) -> None:
        if spec.host is None:
            spec = replace(spec, host=ray.util.get_node_ip_address())
        self._worker = load_entry_point(entry_point)(spec)

    def run(self) -> None:
        self._worker.run()

    def stop(self) -> None:
        self._worker.stop()


@ray.remote(num_cpus=0)
class HeadActor:
    """Hosts the head: router, controller and the doors that clients come in by."""

    def __init__(self, entry_point: str, spec: Any) -> None:
        self._head = load_entry_point(entry_point)(spec)

    async def start(self) -> str:
        """Open the doors; returns the gRPC address."""
        return str(await self._head.start())

    async def wait(self) -> None:
        """Returns when the cluster has been shut down."""
        await self._head.wait()

    async def stop(self) -> None:
        await self._head.stop()
