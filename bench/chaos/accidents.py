"""Faults of workers and their router: a kill, a temporary freeze, a partition. Drawn by seed and injected at
a chosen point of the streams' progress."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .leftovers import router_pid
from .network import NetworkFaults
from .streams import ObservedStream
from .watch import Watch

KINDS = ("kill", "freeze")
PARTITIONS = ("cut off from the router", "cut off from the other pool")
ROUTER = "router"
MOMENTS = ("before the first token", "during the transfer", "mid decode")


@dataclass(frozen=True)
class Victim:
    worker_id: str
    pid: int


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
    ended: threading.Timer | None = None  # the end of a freeze or a cut

    def __str__(self) -> str:
        lasting = "" if self.kind == "kill" else f" {self.duration_s:.1f} s"
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


def strike(
    accident: InjectedAccident,
    streams: list[ObservedStream],
    watch: Watch,
    rng: random.Random,
    network: NetworkFaults,
) -> None:
    """Wait for the moment, then do it. A pool without a ready worker is spared, and so is a router that is
    not there yet."""
    _wait_for_moment(accident, streams, rng)
    chosen = _candidates(accident.role, watch)
    if not accident.is_whole_pool:
        chosen = rng.sample(chosen, min(1, len(chosen)))
    accident.victims = chosen
    if not chosen:
        return
    end = _begin(accident, [victim.pid for victim in chosen], watch, network)
    if end is not None:
        accident.ended = threading.Timer(accident.duration_s, end)
        accident.ended.start()
    time.sleep(accident.aftermath_s)


def _candidates(role: str, watch: Watch) -> list[Victim]:
    if role == ROUTER:
        pid = router_pid()
        return [] if pid is None else [Victim(ROUTER, pid)]
    ready = [Victim(worker.worker_id, worker.pid) for worker in watch.ready_workers(role)]
    return [
        victim for victim in ready if Path(f"/proc/{victim.pid}").exists()
    ]  # the status is a little behind


def _begin(
    accident: InjectedAccident, pids: list[int], watch: Watch, network: NetworkFaults
) -> Callable[[], None] | None:
    """Returns what ends it."""
    if accident.kind in KINDS:
        processes = [os.pidfd_open(pid) for pid in pids]
        is_kill = accident.kind == "kill"
        accident.at_s = time.monotonic()
        _signal(processes, signal.SIGKILL if is_kill else signal.SIGSTOP)
        if not is_kill:
            return lambda: _signal(processes, signal.SIGCONT, close=True)
        _signal(processes, 0, close=True)
        return None
    at_s, mend = time.monotonic(), _cut_off(accident, pids, watch, network)
    if mend is None:
        accident.victims = []
    else:
        accident.at_s = at_s
    return mend


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
