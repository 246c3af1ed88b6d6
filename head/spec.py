"""What a head is told at its start."""

from dataclasses import dataclass
from typing import Any

from ..core.devices import DeviceKind
from ..core.logs import LogSettings


@dataclass(frozen=True)
class Doors:
    """Where a head listens; the next one listens there too, and starts workers on the same kind of device."""

    grpc: str
    http: str | None  # None: nowhere
    control_port: int
    device: DeviceKind


@dataclass(frozen=True)
class HeadSpec:
    """What a head needs to know. `door` is the entry point of the clients' server, as `package.module:name`."""

    keeper: Any  # the actor that outlives it
    door: str
    token: str
    host: str | None  # where workers reach the head; None: the node's address as Ray knows it
    log: LogSettings | None = None  # None: as Python does by default
    otlp_endpoint: str | None = None  # where traces go
    local: str | None = None  # a Unix socket for the process that launched the cluster, as `unix:PATH`
    accept_open_ray: bool = False  # nobody else reaches the hosts
    generation: int = 0  # how many heads were before it
    doors: Doors | None = None  # where those listened
