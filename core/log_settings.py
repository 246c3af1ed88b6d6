"""The log settings of a process, passed to each process of a cluster at its start."""

from dataclasses import dataclass
from typing import Literal

LogFormat = Literal["json", "console"]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How a process logs. `relay`: the socket of the process that shows the lines; None, or out of reach: to
    stderr."""

    format: LogFormat = "json"
    level: str = "info"
    relay: str | None = None
