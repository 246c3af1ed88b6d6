"""The state that a new router takes over from its predecessor: the legs that workers hold, assembled into
dispatches and requests.

Nothing is decided until every worker has reported what it holds or is given up: one worker's leg is only half
of a dispatch."""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.errors import NoWorkerAvailable
from ..core.messages import HeldLeg, Leg
from ..core.request import HeldSpec, TransferId
from .events import RouterEvent, Submit, WorkerAway, WorkerLost, WorkerReady

WorkerKey = tuple[str, int]  # (worker_id, incarnation)


@dataclass(slots=True)
class HeldDispatch:
    """The legs of one dispatch and the workers that hold them."""

    spec: HeldSpec
    legs: dict[Leg, tuple[WorkerKey, HeldLeg]] = field(default_factory=dict)

    @property
    def is_broken(self) -> bool:
        """Whether a leg waits for KV, or for a receiver of its KV, that cannot arrive: its partner's leg is
        gone."""
        return self._waits(Leg.PREFILL, Leg.DECODE) or (
            self._waits(Leg.DECODE, Leg.PREFILL) and not self.legs[Leg.DECODE][1].num_outputs
        )

    def _waits(self, leg: Leg, partner: Leg) -> bool:
        held = self.legs[leg][1] if leg in self.legs else None
        if held is None or held.ended is not None or not held.has_partner:
            return False
        other = self.legs[partner][1] if partner in self.legs else None
        return other is None or (other.ended is not None and other.ended.error is not None)


@dataclass(slots=True)
class HeldRequest:
    """The remains of one request. `unusable` are dispatches that it cannot continue, mostly those of an
    earlier request with the same id."""

    spec: HeldSpec  # of its newest dispatch
    dispatches: list[HeldDispatch]  # newest first
    unusable: list[HeldDispatch]


class Adoption:
    """Gathers workers' reports until all workers have reported."""

    def __init__(self) -> None:
        self.ready: list[WorkerReady] = []
        self.later: deque[RouterEvent] = deque()  # other events, to be handled afterwards
        self.is_closed = False  # every worker has reported, and the take-over is under way

    def take(self, event: RouterEvent) -> None:
        """Records an event. Raises NoWorkerAvailable for a Submit: a worker that has not reported may be
        serving this very request."""
        match event:
            case Submit():
                raise NoWorkerAvailable("the router has just started and waits for its workers")
            case _ if self.is_closed:
                self.later.append(event)
            case WorkerReady():
                self.ready.append(event)
            case WorkerLost(worker_id, incarnation) if not self._has_spoken(worker_id, incarnation):
                pass  # its connection broke before it reported; it may reconnect
            case WorkerAway(worker_id, incarnation):
                key = worker_id, incarnation  # it reports everything again
                self.ready = [r for r in self.ready if (r.info.worker_id, r.info.incarnation) != key]
            case _:
                self.later.append(event)

    def _has_spoken(self, worker_id: str, incarnation: int) -> bool:
        return any((r.info.worker_id, r.info.incarnation) == (worker_id, incarnation) for r in self.ready)

    def requests(self) -> Iterator[HeldRequest | None]:
        """Yields the requests in the order in which workers reported them; before that, None for each worker
        whose legs have been gathered."""
        dispatches: defaultdict[str, dict[TransferId, HeldDispatch]] = defaultdict(dict)
        for ready in self.ready:
            yield None
            for held in ready.held:
                transfer = held.spec.transfer
                dispatch = dispatches[transfer.request_id].setdefault(transfer, HeldDispatch(held.spec))
                dispatch.legs[held.leg] = (ready.info.worker_id, ready.info.incarnation), held
        for of_one_id in dispatches.values():
            newest_first = sorted(of_one_id.values(), key=lambda dispatch: -dispatch.spec.transfer.attempt)
            identity = newest_first[0].spec.identity
            same = [d for d in newest_first if d.spec.identity == identity and _tells_all(d.spec)]
            unusable = [d for d in newest_first if d not in same]
            yield HeldRequest(newest_first[0].spec, same, unusable)


def _tells_all(spec: HeldSpec) -> bool:
    """Whether all log probabilities are available: those of an earlier attempt's tokens, and those of the
    prompt that came with its first token, are lost."""
    sampling = spec.sampling
    return (sampling.logprobs is None and sampling.prompt_logprobs is None) or not spec.packed_output
