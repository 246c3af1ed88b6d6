"""Samples the state of a worker's GPU every few seconds on a thread of its own: a slow driver holds up
neither the engine nor the heartbeat."""

import logging
import threading

from ..core.messages import GpuSample
from ..engine.gpu import DeviceInfo, GpuProbe

log = logging.getLogger(__name__)

INTERVAL_S = 5.0


class GpuMonitor:
    """Runs from `start` to `stop`."""

    def __init__(self, device: DeviceInfo) -> None:
        self._device = device
        self._newest: GpuSample | None = None  # None: already taken, or none yet
        self._stopping = threading.Event()
        # the process may end without it
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self) -> GpuSample | None:
        """Returns the newest sample, once; may be called from any one thread."""
        newest, self._newest = self._newest, None
        return newest

    def stop(self) -> None:
        """Asks the thread to end; a thread that waits for the driver is left behind."""
        self._stopping.set()

    def _run(self) -> None:
        probe = GpuProbe.open(self._device)
        if probe is None:
            log.warning("%s is not watched: its driver does not answer", self._device.name)
            return
        with probe:
            self._newest = probe.sample()
            while not self._stopping.wait(INTERVAL_S):
                self._newest = probe.sample()
