"""The hosts of a cluster: those that cluster.yaml asks for, and the state of each."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExpectedHosts:
    """Hosts beside the head's. By default nobody is waited for, and instances may start on any host that
    joins."""

    addresses: tuple[str, ...] | None = None  # these, and no others; None: the file does not name them
    # of a cloud: how many hosts there will be at least
    node_types: Mapping[str, int] = field(default_factory=dict)
    max_hosts: int = 0  # of a cloud: how many Ray's autoscaler starts at most
    # by name among `addresses`, where that is known
    resolved: Mapping[str, str] = field(default_factory=dict)

    @property
    def can_grow(self) -> bool:
        """Whether Ray's autoscaler starts hosts beyond those that there will be at least."""
        return self.max_hosts > sum(self.node_types.values())

    def name_of(self, address: str, name: str) -> str | None:
        """The name under which the file lists the host with this address and host name; None when it does
        not."""
        for expected in self.addresses or ():
            if expected in (address, name) or self.resolved.get(expected) == address:
                return expected
        return None


class HostState(enum.Enum):
    """The state of a host."""

    AWAITED = "awaited"  # it has not joined
    CHECKING = "checking"  # it has joined, or is in doubt: nothing starts there until it has answered
    JOINED = "joined"
    REFUSED = "refused"  # it joined, and cannot serve
    LOST = "lost"  # it had joined
    # it is there, but the file does not name it: nothing starts there, and what runs there drains
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """One host's row. Only the name is known of a host that has not joined."""

    address: str  # as in the file, for a host that has not joined
    name: str = ""  # its host name
    state: HostState
    since_s: float  # for how long it has been in its state
    message: str = ""  # its problem, and the remedy
    num_cores: int = 0  # that instances may have
    num_cores_taken: float = 0.0
    num_gpus: int = 0
    num_gpus_taken: float = 0.0
    memory_bytes: int = 0  # that was available when the host joined
    worker_ids: tuple[str, ...] = ()  # the instances there
