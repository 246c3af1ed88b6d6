"""Who is told what becomes of requests, without a say in it: metrics, traces, logs."""

from typing import Protocol

from .events import RouterEvent, Timeline


class RequestRecorder(Protocol):
    """Called on the router's loop; whoever implements it returns soon."""

    def observe(self, event: RouterEvent) -> None:
        """Before the router handles it."""
        ...

    def closed(self, timeline: Timeline) -> None:
        """No worker holds anything for the request any more."""
        ...
