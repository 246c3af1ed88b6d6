"""How a worker's GPU fares, asked for every few seconds on a thread of its own: a driver that takes its time
holds up neither the engine nor the heartbeat."""

import logging
import threading

from ..core.messages import GpuSample
from ..engine.gpu import DeviceInfo, GpuProbe

log = logging.getLogger(__name__)

INTERVAL_S = 5.0


class GpuMonitor:
    """Lives from `start` to `stop`."""

    def __init__(self, device: DeviceInfo) -> None:
        self._device = device
        self._newest: GpuSample | None = None  # None: taken, or none yet
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="gpu-monitor", daemon=True
        )  # the process may end without it

    def start(self) -> None:
        self._thread.start()

    def take(self) -> GpuSample | None:
        """The newest sample, once; from any one thread."""
        newest, self._newest = self._newest, None
        return newest

    def stop(self) -> None:
        """Ask the thread to end; one that waits for the driver is left behind."""
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
