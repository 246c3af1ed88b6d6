"""NCCL's twin on the processor: a gloo group whose operations are watched as a GPU's are, and can be aborted."""

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch

WAIT = timedelta(seconds=30)


class Operation:
    """As torch's `WorkNCCL`."""

    def __init__(self, future: "Future[object]") -> None:
        self._future = future

    def is_completed(self) -> bool:
        return self._future.done()

    def exception(self) -> BaseException | None:
        return self._future.exception()


class Aborted(RuntimeError):
    """The group was."""


class TwinGroup:
    """One rank. Operations are done in their order, each on what it is given when its turn comes."""

    living: "list[TwinGroup]" = []  # noqa: RUF012  (all of this process)

    def __init__(self, store: Any, rank: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = WAIT
        options._threads = 1
        self._gloo = ProcessGroupGloo(store, rank, 2, options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pdserve-twin")
        self._is_aborted = False
        self.hangs_in_abort = False
        self.num_sends = 0
        self.living.append(self)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Operation:
        self.num_sends += 1
        return self._queue(self._gloo.send, tensors, peer, tag)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Operation:
        return self._queue(self._gloo.recv, tensors, peer, tag)

    def _queue(self, operation: Any, *args: Any) -> Operation:
        if self._is_aborted:
            raise Aborted("the group was aborted")
        return Operation(self._thread.submit(lambda: operation(*args).wait(WAIT)))

    def abort(self) -> None:
        """Operations under way end with their peer's abort, as its connections close."""
        self._is_aborted = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.living.remove(self)
        del self._gloo
