"""Decides which hosts serve. In: the hosts that the configuration asks for and those that Ray sees. Out:
hosts to check and to vacate.

AWAITED -> CHECKING -> JOINED -> LOST -> CHECKING ...   LOST: Ray declared it dead; back under another node id
              |  ^        |                                  REFUSED: backs off, then checked again
              v  |        v                                  JOINED -> CHECKING: a worker there was lost
           REFUSED     LEAVING                          JOINED -> REFUSED: it is full
                                                        LEAVING: the configuration does not name it
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isinf

from ..core.automaton import Automaton
from ..core.hosts import ExpectedHosts, HostState, HostStatus
from .cores import Capacity, Key
from .events import Tick
from .fleet_events import HostJoined
from .places import Places

CHECK_AGAIN_S = 5.0  # after the first consecutive refusal; doubles with each
MAX_CHECK_AGAIN_S = 60.0
WATCH_INTERVAL_S = 1.0  # between two looks at the hosts that Ray lists
LOST_INSTANCE = "an instance there was lost for no known reason; the host is being checked"


@dataclass(frozen=True, slots=True)
class SeenHost:
    """A live Ray node."""

    node_id: str
    address: str
    name: str  # the host's
    node_type: str = ""  # of a cloud
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class ExpectHosts:
    """The hosts that the configuration in force asks for, and how long it waits for each."""

    hosts: ExpectedHosts
    join_timeout_s: float


@dataclass(frozen=True, slots=True)
class HostsSeen:
    """All nodes that are alive now, according to Ray."""

    hosts: tuple[SeenHost, ...]


@dataclass(frozen=True, slots=True)
class HostChecked:
    """A host's answer to CheckHost."""

    node_id: str
    capacity: Capacity
    refusal: str = ""  # why it cannot serve, and what to do; empty: it can
    warning: str = ""  # a problem that does not keep it from serving


@dataclass(frozen=True, slots=True)
class HostSuspected:
    """A worker there was lost for no known reason: the host may be down or cut off, which Ray may notice
    later. Nothing starts there until it has answered again."""

    node_id: str


@dataclass(frozen=True, slots=True)
class HostRefused:
    """A worker there reports that the host is full. Repeated while that holds: the host is checked when no
    report has come for a while."""

    node_id: str
    refusal: str


HostEvent = ExpectHosts | HostsSeen | HostChecked | HostSuspected | HostRefused | Tick


@dataclass(frozen=True, slots=True)
class CheckHost:
    """Asks the host for its facts; answered by HostChecked."""

    node_id: str


@dataclass(frozen=True, slots=True)
class VacateHost:
    """Drains these instances and starts others elsewhere in their place."""

    workers: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class HostChanged:
    """For the log."""

    name: str
    state: HostState
    message: str


HostAction = CheckHost | VacateHost | HostChanged | HostJoined

TRANSITIONS = {
    HostState.CHECKING: {HostState.JOINED, HostState.REFUSED, HostState.LEAVING},
    HostState.JOINED: {HostState.CHECKING, HostState.REFUSED, HostState.LEAVING},
    HostState.REFUSED: {HostState.CHECKING, HostState.LEAVING},
    HostState.LEAVING: {HostState.CHECKING},
}


@dataclass(slots=True)
class _Host(Automaton[HostState]):
    """A host that is present."""

    seen: SeenHost
    since_s: float  # when it entered its state
    capacity: Capacity | None = None  # None until it has answered for the first time
    message: str = ""
    check_again_s: float | None = None
    num_refusals: int = 0  # consecutive
    there: tuple[Key, ...] = ()  # the instances there when it was asked last

    def __post_init__(self) -> None:
        Automaton.__init__(self, TRANSITIONS, HostState.CHECKING, at_s=self.since_s)

    def __str__(self) -> str:
        return f"host {self.seen.address}"

    def enter(self, target: HostState, now_s: float, message: str = "") -> None:
        self.transition(target, now_s, message)
        self.since_s, self.message, self.check_again_s = now_s, message, None


@dataclass(slots=True)
class _Missing:
    """A host that is asked for and absent."""

    since_s: float
    state: HostState = HostState.AWAITED
    is_late: bool = False


@dataclass
class Hosts:
    """Restricts `places` to the hosts that serve."""

    places: Places
    _expected: ExpectedHosts = field(default_factory=ExpectedHosts)
    _join_timeout_s: float = 0.0
    _hosts: dict[str, _Host] = field(default_factory=dict)  # by Ray's node id
    _missing: dict[str, _Missing] = field(default_factory=dict)  # by name
    _out: list[HostAction] = field(default_factory=list)

    def handle(self, event: HostEvent, now_s: float) -> list[HostAction]:
        self._out = []
        match event:
            case ExpectHosts(hosts, join_timeout_s):
                self._expected, self._join_timeout_s = hosts, join_timeout_s
            case HostsSeen(hosts):
                self._look(hosts, now_s)
            case HostChecked():
                self._checked(event, now_s)
            case HostSuspected(node_id):
                host = self._hosts.get(node_id)
                if host is not None and host.state is HostState.JOINED and not host.seen.is_head:
                    self._check(host, now_s, LOST_INSTANCE)
            case HostRefused(node_id, refusal):
                host = self._hosts.get(node_id)
                if host is not None and host.state is not HostState.LEAVING:
                    self._refuse(host, refusal, now_s, CHECK_AGAIN_S)
        for host in self._hosts.values():
            self._keep_to_the_file(host, now_s)
            if host.check_again_s is not None and host.check_again_s <= now_s:
                self._check(host, now_s)
        self._count_missing(now_s)
        return self._out

    def are_complete(self, expected: ExpectedHosts) -> bool:
        """Whether all hosts of a configuration serve, so that no more are expected."""
        there = [host for host in self._hosts.values() if _is_listed(host.seen, expected)]
        if expected.can_grow and sum(not host.seen.is_head for host in there) < expected.max_hosts:
            return False
        return all(host.state is HostState.JOINED for host in there) and not any(self._absent(expected))

    def capacity(self, node_id: str) -> Capacity:
        """Returns what a serving host has for instances, those that are running there included."""
        capacity = self._hosts[node_id].capacity
        assert capacity is not None, "a host serves once it has answered"
        return capacity

    def serving(self, expected: ExpectedHosts) -> tuple[str, ...]:
        """Returns the node ids of a configuration's hosts on which instances may start."""
        return tuple(
            node_id
            for node_id, host in self._hosts.items()
            if host.state is HostState.JOINED and _is_listed(host.seen, expected)
        )

    def status(self, now_s: float) -> tuple[HostStatus, ...]:
        """Returns the status of each host: the head's first, then in order of joining, then missing ones."""
        seen = sorted(self._hosts.values(), key=lambda host: not host.seen.is_head)
        missing = [
            HostStatus(address=name, state=one.state, since_s=now_s - one.since_s, message=self._why(one))
            for name, one in self._missing.items()
        ]
        return (*(self._row(host, now_s) for host in seen), *missing)

    @property
    def names(self) -> dict[str, str]:
        """Returns node id -> host name for the hosts that are present."""
        return {node_id: host.seen.name for node_id, host in self._hosts.items()}

    def problems(self) -> str | None:
        """Describes the hosts that should serve and do not; None when there are none."""
        return "; ".join(f"host {name}: {why}" for name, why in self._problems()) or None

    def _problems(self) -> Iterator[tuple[str, str]]:
        for host in self._hosts.values():
            if host.state in (HostState.REFUSED, HostState.CHECKING):
                yield host.seen.address, host.message or "is being checked"
        for name, missing in self._missing.items():
            yield name, self._why(missing)

    def _why(self, missing: _Missing) -> str:
        if missing.state is HostState.LOST:
            return (
                "is lost: Ray does not reach it, and uses it again once Ray runs there again (`ray up`"
                " starts it)"
            )
        if missing.is_late:
            return (
                f"has not joined within join_timeout_s ({self._join_timeout_s:g} s): serving without it until"
                " it does"
            )
        return "has not joined; waiting for it"

    def _row(self, host: _Host, now_s: float) -> HostStatus:
        capacity = host.capacity or Capacity(0, num_bytes=0)
        cores, gpus = self.places.cores.num_taken(host.seen.node_id)
        return HostStatus(
            address=host.seen.address,
            name=host.seen.name,
            state=host.state,
            since_s=now_s - host.since_s,
            message=host.message,
            num_cores=capacity.num_cores,
            num_cores_taken=cores,
            num_gpus=capacity.num_gpus,
            num_gpus_taken=gpus,
            memory_bytes=0 if isinf(capacity.num_bytes) else int(capacity.num_bytes),
            worker_ids=tuple(sorted({worker_id for worker_id, _ in self.places.cores.on(host.seen.node_id)})),
        )

    def _look(self, seen: tuple[SeenHost, ...], now_s: float) -> None:
        alive = {host.node_id: host for host in seen}
        for node_id in [node_id for node_id in self._hosts if node_id not in alive]:
            lost = self._hosts.pop(node_id)
            self.places.cores.close(node_id)
            name = self._expected.name_of(lost.seen.address, lost.seen.name)
            if name is not None:
                self._missing[name] = _Missing(now_s, HostState.LOST)
            self._out.append(HostChanged(lost.seen.address, HostState.LOST, "Ray has declared it dead"))
        for node_id, one in alive.items():
            if node_id not in self._hosts:
                host = self._hosts[node_id] = _Host(one, now_s)
                self._ask(host)
                self._out.append(HostChanged(host.seen.address, HostState.CHECKING, "has joined"))

    def _check(self, host: _Host, now_s: float, why: str = "") -> None:
        self.places.cores.close(host.seen.node_id)
        message = host.message if host.state is HostState.REFUSED else why
        host.enter(HostState.CHECKING, now_s, message)
        self._ask(host)

    def _ask(self, host: _Host) -> None:
        host.there = tuple(self.places.cores.on(host.seen.node_id))
        self._out.append(CheckHost(host.seen.node_id))

    def _checked(self, event: HostChecked, now_s: float) -> None:
        host = self._hosts.get(event.node_id)
        if host is None or host.state is not HostState.CHECKING:
            return
        if event.refusal:
            pause_s = min(CHECK_AGAIN_S * 2.0 ** min(host.num_refusals, 16), MAX_CHECK_AGAIN_S)
            self._refuse(host, event.refusal, now_s, pause_s)
            host.num_refusals += 1
            return
        first = host.capacity is None
        if first and host.there != tuple(self.places.cores.on(event.node_id)):
            self._ask(host)  # one has ended meanwhile: whether its memory was free already is unknown
            return
        host.enter(HostState.JOINED, now_s, event.warning)
        host.num_refusals = 0
        if first:  # later on, the instances that are counted there occupy its memory
            num_bytes = event.capacity.num_bytes + self.places.cores.num_bytes_taken(event.node_id)
            host.capacity = replace(event.capacity, num_bytes=num_bytes)
        assert host.capacity is not None
        self.places.cores.open(event.node_id, host.capacity)
        self._out.append(HostChanged(host.seen.address, HostState.JOINED, event.warning))
        if first:
            self._out.append(HostJoined())

    def _refuse(self, host: _Host, refusal: str, now_s: float, pause_s: float) -> None:
        """Logs a refusal once, however often it is repeated."""
        was = host.message
        self.places.cores.close(host.seen.node_id)
        if host.state is not HostState.REFUSED:
            host.enter(HostState.REFUSED, now_s, refusal)
        host.message, host.check_again_s = refusal, now_s + pause_s
        if refusal != was:
            self._out.append(HostChanged(host.seen.address, HostState.REFUSED, refusal))

    def _keep_to_the_file(self, host: _Host, now_s: float) -> None:
        is_listed = _is_listed(host.seen, self._expected)
        if is_listed and host.state is HostState.LEAVING:
            self._check(host, now_s)
        elif not is_listed and host.state is not HostState.LEAVING:
            host.enter(HostState.LEAVING, now_s, "provider.worker_ips does not name it")
            self.places.cores.close(host.seen.node_id)
            self._out.append(HostChanged(host.seen.address, HostState.LEAVING, host.message))
            workers = tuple(self.places.cores.on(host.seen.node_id))
            if workers:
                self._out.append(VacateHost(workers))

    def _count_missing(self, now_s: float) -> None:
        wanted = list(self._absent(self._expected))
        self._missing = {name: self._missing.get(name) or _Missing(now_s) for name in wanted}
        for name, missing in self._missing.items():
            is_due = missing.state is HostState.AWAITED and now_s - missing.since_s >= self._join_timeout_s
            if is_due and not missing.is_late:
                missing.is_late = True
                self._out.append(HostChanged(name, HostState.AWAITED, self._why(missing)))

    def _absent(self, expected: ExpectedHosts) -> Iterator[str]:
        """Yields the names of hosts that are asked for and absent."""
        named = {expected.name_of(host.seen.address, host.seen.name) for host in self._hosts.values()}
        yield from (address for address in expected.addresses or () if address not in named)
        there = Counter(host.seen.node_type for host in self._hosts.values() if not host.seen.is_head)
        for node_type, count in expected.node_types.items():
            yield from (
                f"{node_type} ({number} of {count})" for number in range(there[node_type] + 1, count + 1)
            )


def _is_listed(seen: SeenHost, expected: ExpectedHosts) -> bool:
    return expected.addresses is None or seen.is_head or expected.name_of(seen.address, seen.name) is not None
