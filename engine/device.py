"""Where an engine computes: events between queues of work, graphs of captured work, pinned memory to copy
from.

`CudaDevice` is a GPU. `HostDevice` has the same face over the processor, where all work is done when a call
returns: it is what an engine on Triton's interpreter runs on, and it replays a captured graph by calling its
function again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

_CONTEXT_BYTES = 600 << 20  # of the driver and the libraries, which torch does not count


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. Others may use the device too: what is free may be less than `total` less `used`."""

    total: int
    free: int
    used: int  # by this process


class DeviceEvent(Protocol):
    """A point in a queue of work; the calls are those of `torch.cuda.Event`."""

    def record(self) -> None:
        """The point is behind all that is in the current stream now."""
        ...

    def wait(self) -> None:
        """What the current stream is given from now on comes after the point; the host goes on."""
        ...

    def synchronize(self) -> None:
        """The host waits for the point."""
        ...

    def query(self) -> bool:
        """Whether the point is reached."""
        ...


class Graph(Protocol):
    """Captured work over memory that stays where it is."""

    def replay(self) -> None:
        """Queue the work once more."""
        ...


class Device(Protocol):
    """One per engine. Work is queued on the calling thread's current stream."""

    torch_device: torch.device
    runs_ahead: bool  # calls return before their work is done

    def event(self) -> DeviceEvent: ...

    def side_stream(self) -> AbstractContextManager[object]:
        """A stream of its own for whatever is queued inside; the same one in every call of what is
        returned."""
        ...

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor's copy in memory from which the device copies while the host goes on."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` queues. It was called before, so that all kernels are compiled, and touches no
        memory but what stays alive as long as the graph, and what it allocates itself."""
        ...

    def memory(self) -> DeviceMemory: ...

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Do `work`; returns the memory that it needed for a while, beside what was held before."""
        ...


class CudaDevice:
    """The GPU that is this process' current one."""

    runs_ahead = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # Of a high priority: what is short, and others wait for, is not to queue behind the blocks of a
        # matrix product.
        self._side_stream = torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[no-untyped-call]
        self._pool = (
            torch.cuda.graph_pool_handle()
        )  # graphs never run side by side, so they share their memory

    def event(self) -> DeviceEvent:
        """Who waits for it sleeps: a worker has a core or two for all of its threads."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side_stream)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Another thread's calls, such as a transfer's, are no part of it and are not to spoil it.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            reason = (
                error.__context__ or error
            )  # the end of a capture that has failed fails too, and says less
            raise RuntimeError(f"capturing a decode step failed: {reason}") from reason
        return graph

    def memory(self) -> DeviceMemory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(total, free, torch.cuda.memory_reserved(self.torch_device) + _CONTEXT_BYTES)

    def peak_bytes(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        held = torch.cuda.memory_allocated(self.torch_device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - held


class HostEvent:
    """Everything before it is done already."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostGraph:
    """The function itself."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class HostDevice:
    """The processor, in whose one queue everything is done at once."""

    torch_device = torch.device("cpu")
    runs_ahead = False

    def __init__(self, memory_bytes: int = 2 << 30) -> None:
        self._memory_bytes = memory_bytes  # of what a GPU would have of its own

    def event(self) -> DeviceEvent:
        return HostEvent()

    def side_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def capture(self, work: Callable[[], None]) -> Graph:
        return HostGraph(work)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self._memory_bytes, self._memory_bytes, 0)

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        return 0
