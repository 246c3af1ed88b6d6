"""The share of each GPU of one machine that is taken, by Ray's rule for assigning GPUs to actors. Pure
bookkeeping."""

EPSILON = 1e-6  # shares add up with errors of rounding: three of 0.3333 of a GPU, say


class GpuShares:
    """An instance has a share of one GPU, up to the whole. It gets the fullest GPU that has room, of equal
    ones the first, so that instances that can share one do, and whole GPUs stay free (Ray's
    `NodeResourceInstanceSet::TryAllocate`)."""

    def __init__(self, num_gpus: int) -> None:
        self._free = [1.0] * num_gpus

    def find(self, share: float) -> int | None:
        """The GPU that the next instance would get, by position; None when none has room."""
        fitting = [gpu for gpu, left in enumerate(self._free) if left >= share - EPSILON]
        return min(fitting, key=lambda gpu: round(self._free[gpu] / EPSILON), default=None)

    def rank(self, share: float) -> tuple[float, float]:
        """The key that orders machines with room: the least keeps instances closest together."""
        gpu = self.find(share)
        assert gpu is not None
        return round(self._free[gpu], 4), round(sum(self._free), 4)

    @property
    def num_free(self) -> float:
        return sum(self._free)

    def take(self, share: float) -> int:
        """The position of the GPU; the caller knows that there is one."""
        gpu = self.find(share)
        assert gpu is not None
        self.take_back(gpu, share)
        return gpu

    def take_back(self, gpu: int, share: float) -> None:
        """An instance is there already."""
        self._free[gpu] -= share

    def give_back(self, gpu: int, share: float) -> None:
        self._free[gpu] += share
