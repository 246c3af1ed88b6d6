"""The device of an engine: events between queues of work, graphs of captured work, pinned memory to copy
from.

`CudaDevice` is a GPU. `HostDevice` has the same interface over the CPU, where all work is done when a call
returns: an engine on Triton's interpreter runs on it, and it replays a captured graph by calling its function
again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

_CONTEXT_BYTES = 600 << 20  # used by the driver and the libraries, which torch does not count


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory in bytes. Other processes may use it too, so less than the difference may be free."""

    total: int
    free: int
    used: int  # by this process


class DeviceEvent(Protocol):
    """A point in a queue of work; the calls are those of `torch.cuda.Event`."""

    def record(self) -> None:
        """Places the point behind all work now in the current stream."""
        ...

    def wait(self) -> None:
        """Makes later work of the current stream follow the point; the host does not wait."""
        ...

    def synchronize(self) -> None:
        """Blocks the host until the point is reached."""
        ...

    def query(self) -> bool:
        """Returns whether the point is reached."""
        ...


class Graph(Protocol):
    """Captured work over memory at fixed addresses."""

    def replay(self) -> None:
        """Queues the work once more."""
        ...


class Device(Protocol):
    """One per engine. Work is queued on the calling thread's current stream."""

    torch_device: torch.device
    runs_ahead: bool  # calls return before their work is done

    def event(self) -> DeviceEvent: ...

    def side_stream(self) -> AbstractContextManager[object]:
        """Returns a context manager that queues work on a separate stream, the same one in each use."""
        ...

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy of a host tensor in memory from which the device copies while the host continues."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Captures the work that `work` queues. It was called before, so that all kernels are compiled, and
        touches no memory but its own allocations and memory that stays alive as long as the graph."""
        ...

    def memory(self) -> DeviceMemory: ...

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs `work`; returns its peak temporary memory, in addition to the memory held before."""
        ...


class CudaDevice:
    """The current GPU of this process."""

    runs_ahead = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # High priority: short work that others wait for must not queue behind the blocks of a
        # matrix product.
        self._side_stream = torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[no-untyped-call]
        # graphs never run side by side, so they share their memory
        self._pool = torch.cuda.graph_pool_handle()

    def event(self) -> DeviceEvent:
        """A thread that waits for the event sleeps: a worker has a core or two for all of its threads."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side_stream)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def capture(self, work: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads, such as a transfer's, are not captured and must not invalidate the capture.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            reason = error.__context__ or error  # ending a failed capture fails too, and says less
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
    """Does nothing: all previous work is done already."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostGraph:
    """Calls the function itself."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class HostDevice:
    """The CPU, whose single queue does all work at once."""

    torch_device = torch.device("cpu")
    runs_ahead = False

    def __init__(self, memory_bytes: int = 2 << 30) -> None:
        self._memory_bytes = memory_bytes  # simulates a GPU's own memory

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
