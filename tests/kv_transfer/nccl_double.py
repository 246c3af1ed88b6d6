"""A test double of NCCL on the CPU: a gloo group that is monitored like a GPU's, and can be aborted.

Its operations are torch's own `Work`: a call that `Work` lacks fails here as it would on a GPU."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ErrorType, Work

WAIT = timedelta(seconds=30)


class Aborted(RuntimeError):
    """The group was aborted."""


class GroupDouble:
    """One rank. Operations match the peer's by their order alone, whatever their tags say."""

    living: "list[GroupDouble]" = []  # noqa: RUF012  (all of this process)

    def __init__(self, store: Any, rank: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = WAIT
        options._threads = 1
        self._gloo: Any = ProcessGroupGloo(store, rank, 2, options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pdserve-double")
        self._error = ErrorType.SUCCESS
        self._is_aborted = False
        self.num_sends = self._num_receives = 0
        self.living.append(self)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        self.num_sends += 1
        return self._driven(self._gloo.send, tensors, peer, self.num_sends)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        self._num_receives += 1
        return self._driven(self._gloo.recv, tensors, peer, self._num_receives)

    def get_error(self) -> ErrorType:
        return self._error

    def settle(self) -> None:
        """Returns when all operations queued until now are over."""
        self._thread.submit(lambda: None).result()

    def _driven(self, operation: Any, *args: Any) -> Work:
        """Gloo's operations are completed by their waiters, NCCL's by themselves."""
        if self._is_aborted:
            raise Aborted("the group was aborted")
        work: Work = operation(*args)
        self._thread.submit(self._drive, work)
        return work

    def _drive(self, work: Work) -> None:
        try:
            work.wait(WAIT)
        except RuntimeError:
            self._error = ErrorType.COMM_ERROR

    def abort(self) -> None:
        """Operations under way end with their peer's abort, as its connections close."""
        self._is_aborted = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.living.remove(self)
        del self._gloo
