"""Watches a worker's host for parts that fill up, on a thread of its own: a slow disk holds up neither the
engine nor the heartbeat."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ..engine.full import full_parts

INTERVAL_S = 1.0

log = logging.getLogger(__name__)


class HostMonitor:
    """Runs from `start` to `stop`. `on_full` is called with the full parts, again and again while there are
    any."""

    def __init__(self, ray_folder: Path, on_full: Callable[[tuple[tuple[str, int], ...]], None]) -> None:
        self._ray_folder = str(ray_folder)
        self._on_full = on_full
        self._stopping = threading.Event()
        # the process may end without it
        self._thread = threading.Thread(target=self._run, name="host-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end; a thread that waits for a disk is left behind."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                full = full_parts(self._ray_folder)
            except OSError as error:  # a folder that has just gone, say: the next look may succeed
                log.warning("cannot see whether this host is full: %s", error)
                continue
            if full:
                self._on_full(full)
