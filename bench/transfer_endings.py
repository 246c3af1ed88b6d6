"""The ends of a transfer, for a benchmark that waits for them."""

import queue

from pdserve.core.failures import FailureKind
from pdserve.core.messages import TransferStats
from pdserve.core.request import TransferId

_TIMEOUT_S = 60.0


class Endings:
    """The results of transfers, for the caller that waits for the current one."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[TransferStats | RuntimeError | None] = queue.SimpleQueue()

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._ended.put(None)

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._ended.put(stats)

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._ended.put(RuntimeError(f"transfer failed: {error}"))

    on_receive_failed = on_send_failed

    def wait(self, timeout_s: float = _TIMEOUT_S) -> TransferStats | None:
        ended = self._ended.get(timeout=timeout_s)
        if isinstance(ended, RuntimeError):
            raise ended
        return ended
