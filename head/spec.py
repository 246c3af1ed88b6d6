"""The parameters of a head's start."""

from dataclasses import dataclass

from ..core.devices import DeviceKind
from ..core.log_settings import LogSettings


@dataclass(frozen=True)
class Endpoints:
    """Where a head listens; the next one listens there too, and starts workers on the same kind of device."""

    grpc: str
    http: str | None  # None: nowhere
    control_port: int
    device: DeviceKind


@dataclass(frozen=True)
class HeadSpec:
    """The parameters of a head."""

    token: str
    host: str | None  # where workers reach the head; None: the node's address, and hosts may join
    log: LogSettings | None = None  # None: as Python does by default
    otlp_endpoint: str | None = None  # where traces go
    local: str | None = None  # a Unix socket for the process that launched the cluster, as `unix:PATH`
    accept_open_ray: bool = False  # no other user reaches the hosts
    generation: int = 0  # number of heads before it
    endpoints: Endpoints | None = None  # addresses at which those listened
