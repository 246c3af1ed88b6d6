"""Faults of workers and their router: a kill, a temporary freeze, a partition, a gray fault. Drawn by seed
and injected at a chosen point of the streams' progress."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from pdserve.proto import pdserve_pb2_grpc as rpc

from .gray import MAX_DEATHS, GrayFaults, send_deadly, throttle
from .gray_hook import deadly_name
from .leftovers import router_pid
from .network import Loopback, NetworkFaults
from .streams import ObservedStream
from .watch import Watch

KINDS = ("kill", "freeze")
PARTITIONS = ("cut off from the router", "cut off from the other pool")
FAIL_SENDS, FAIL_READS = "links break at each send of", "no KV can be read at"
THROTTLE, STAND_STILL, DEADLY = "throttle to a tenth", "stand still", "deadly request"
GRAY = (FAIL_SENDS, FAIL_READS, THROTTLE, STAND_STILL, DEADLY)
STAND_STILL_S = 20.0
ROUTER = "router"
MOMENTS = ("before the first token", "during the transfer", "mid decode")


@dataclass(frozen=True)
class Victim:
    worker_id: str
    pid: int  # of rank 0
    rank_pids: tuple[int, ...] = ()  # of its other ranks


@dataclass(frozen=True)
class ClusterUnderTest:
    """The cluster that accidents strike. `network`: where it can be cut; `gray`: its workers' switches."""

    generation: rpc.GenerationStub
    watch: Watch
    network: NetworkFaults | None
    gray: GrayFaults | None


@dataclass
class InjectedAccident:
    """A planned fault; `at_s` and `victims` are set once it has been injected."""

    kind: str
    role: str
    moment: str
    is_whole_pool: bool
    duration_s: float  # length of a freeze or a cut
    delay_s: float  # after the moment has come
    # between the death of a router and the next accident, which may strike the new one while it starts
    aftermath_s: float
    progress: float  # share of a stream, 0 to 1, that "mid decode" waits for
    at_s: float | None = None
    victims: list[Victim] = field(default_factory=list)
    ended: threading.Timer | None = None  # the end of a freeze, a cut or a gray fault
    problem: str | None = None  # a promise about its victims that was broken

    def __str__(self) -> str:
        lasting = "" if self.kind in ("kill", DEADLY) else f" {self.duration_s:.1f} s"
        whom = (
            f"all {self.role} workers"
            if self.is_whole_pool
            else ", ".join(victim.worker_id for victim in self.victims)
        )
        return f"{self.kind} {whom or 'nobody'}{lasting} {self.moment}"


def draw(rng: random.Random, with_partitions: bool) -> InjectedAccident:
    """A router is frozen for less than makes workers give it up; it is the other side of a worker that is cut
    off from it."""
    kind = rng.choice((*KINDS, *PARTITIONS) if with_partitions else KINDS)
    role = rng.choice(("prefill", "decode", ROUTER) if kind in KINDS else ("prefill", "decode"))
    return InjectedAccident(
        kind=kind,
        role=role,
        moment=rng.choice(MOMENTS),
        is_whole_pool=rng.random() < 0.1 and role != ROUTER,
        duration_s=rng.uniform(0.1, 5.0) if kind == "freeze" else rng.uniform(3.5, 8.0),
        delay_s=rng.uniform(0.0, 0.1 if kind == "kill" else 0.02),
        aftermath_s=rng.uniform(0.0, 4.0) if role == ROUTER and kind == "kill" else 0.0,
        progress=rng.uniform(0.02, 0.8),
    )


def draw_gray(rng: random.Random) -> InjectedAccident:
    """A worker's fault lasts about as long as its streams; one of its sends begins before they send. A deadly
    request kills workers that compute its prompt, or some token of its output."""
    kind = rng.choice(GRAY)
    roles = {THROTTLE: ("prefill", "decode"), DEADLY: ("prefill", "decode"), STAND_STILL: (ROUTER,)}
    return InjectedAccident(
        kind=kind,
        role=rng.choice(roles.get(kind, ("prefill",))),
        moment=MOMENTS[0] if kind in (FAIL_SENDS, FAIL_READS) else rng.choice(MOMENTS),
        is_whole_pool=False,
        duration_s={STAND_STILL: STAND_STILL_S, DEADLY: 0.0}.get(kind, rng.uniform(3.0, 10.0)),
        delay_s=rng.uniform(0.0, 0.02),
        aftermath_s=0.0,
        progress=rng.uniform(0.02, 0.8),
    )


def strike(
    accident: InjectedAccident, streams: list[ObservedStream], cluster: ClusterUnderTest, rng: random.Random
) -> None:
    """Wait for the moment, then do it. A pool without a ready worker is spared, and so is a router that is
    not there yet."""
    _wait_for_moment(accident, streams, rng)
    if accident.kind == DEADLY:
        end: Callable[[], object] | None = _begin_deadly(accident, cluster, rng)
    else:
        chosen = _candidates(accident.role, cluster.watch)
        if not accident.is_whole_pool:
            chosen = rng.sample(chosen, min(1, len(chosen)))
        accident.victims = chosen
        if not chosen:
            return
        end = _begin(accident, [_process_of(victim, rng) for victim in chosen], cluster)
    if end is not None:
        accident.ended = threading.Timer(accident.duration_s, end)
        accident.ended.start()
    time.sleep(accident.aftermath_s)


def _process_of(victim: Victim, rng: random.Random) -> int:
    """Returns any one of its ranks."""
    return rng.choice((victim.pid, *victim.rank_pids)) if victim.rank_pids else victim.pid


def _candidates(role: str, watch: Watch) -> list[Victim]:
    if role == ROUTER:
        pid = router_pid()
        return [] if pid is None else [Victim(ROUTER, pid)]
    ready = [
        Victim(worker.worker_id, worker.pid, tuple(worker.rank_pids)) for worker in watch.ready_workers(role)
    ]
    return [
        victim for victim in ready if Path(f"/proc/{victim.pid}").exists()
    ]  # the status is a little behind


def _begin(
    accident: InjectedAccident, pids: list[int], cluster: ClusterUnderTest
) -> Callable[[], object] | None:
    """Returns what ends it."""
    if accident.kind in (*KINDS, STAND_STILL, THROTTLE):
        processes = [os.pidfd_open(pid) for pid in pids]
        accident.at_s = time.monotonic()
        if accident.kind == THROTTLE:
            return throttle(processes)
        is_kill = accident.kind == "kill"
        _signal(processes, signal.SIGKILL if is_kill else signal.SIGSTOP)
        if not is_kill:
            return lambda: _signal(processes, signal.SIGCONT, close=True)
        _signal(processes, 0, close=True)
        return None
    at_s = time.monotonic()
    if accident.kind in (FAIL_SENDS, FAIL_READS):
        assert cluster.gray is not None
        accident.at_s = at_s
        return cluster.gray.fail_sends(pids, "send" if accident.kind == FAIL_SENDS else "gather")
    mend = _cut_off(accident, pids, cluster.watch, cluster.network or Loopback())
    if mend is None:
        accident.victims = []
    else:
        accident.at_s = at_s
    return mend


_deadly_numbers = count()


def _begin_deadly(
    accident: InjectedAccident, cluster: ClusterUnderTest, rng: random.Random
) -> Callable[[], object]:
    """Returns what waits for its end, and then knows its victims."""
    assert cluster.gray is not None
    gray = cluster.gray
    num_tokens = 0 if accident.role == "prefill" else rng.randrange(2, 200)
    name = deadly_name(num_tokens, str(next(_deadly_numbers)))
    ending = send_deadly(cluster.generation, rng, name)
    accident.problem = f"the end of {name} is not known"

    def end() -> None:
        accident.problem = ending()
        deaths = gray.deaths(name)
        accident.victims = [Victim(cluster.watch.name_of(death.pid), death.pid) for death in deaths]
        accident.at_s = deaths[0].at_s if deaths else None
        if not 0 < len(deaths) <= MAX_DEATHS:
            accident.problem = f"{len(deaths)} workers died of {name}; {accident.problem or ''}"

    return end


def _cut_off(
    accident: InjectedAccident, pids: list[int], watch: Watch, network: NetworkFaults
) -> Callable[[], None] | None:
    """Cuts the link; None when one of the two sides is dead, or no link exists between them."""
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if accident.kind == PARTITIONS[1]:
            return network.cut_from_peers(
                pids, [victim.pid for victim in _candidates(_other(accident.role), watch)]
            )
        if (router := router_pid()) is not None:
            return network.cut_from_router(pids, router)
    return None


def _signal(processes: list[int], number: int, close: bool = False) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it was killed meanwhile, as it was frozen for too long
            signal.pidfd_send_signal(process, number)
        if close:
            os.close(process)


def _other(role: str) -> str:
    return "decode" if role == "prefill" else "prefill"


def _wait_for_moment(accident: InjectedAccident, streams: list[ObservedStream], rng: random.Random) -> None:
    if accident.moment == "during the transfer":
        stream = max(streams, key=lambda stream: len(stream.template.prompt))
        _wait_until(stream, 1)
    elif accident.moment == "mid decode":
        stream = rng.choice(streams)
        _wait_until(stream, int(accident.progress * stream.template.sampling["max_tokens"]))
    time.sleep(accident.delay_s if accident.moment != "during the transfer" else accident.delay_s / 20)


def _wait_until(stream: ObservedStream, num_tokens: int) -> None:
    """Waits for the moment, or until no further progress is possible."""
    while stream.num_tokens < num_tokens and not stream.is_ended and stream.error is None:
        time.sleep(0.0005)
