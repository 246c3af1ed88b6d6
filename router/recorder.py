"""Passive observers of requests: metrics, traces, logs."""

from typing import Protocol

from .events import RouterEvent, Timeline


class RequestRecorder(Protocol):
    """Called on the router's loop; implementations return soon."""

    def observe(self, event: RouterEvent) -> None:
        """Receives an event before the router handles it."""
        ...

    def closed(self, timeline: Timeline) -> None:
        """Called when no worker holds anything for the request any more."""
        ...
