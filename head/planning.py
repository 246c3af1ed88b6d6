"""The head's part of the live planner: sums up what came, tells the planner process, and changes the ratio
where its advice is to be followed."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from ..core.config import ClusterConfig
from ..core.errors import PdserveError
from ..core.latency import LatencyModel
from ..core.messages import Role
from ..planner.seen_load import seen_request
from ..router.core import Router
from ..router.events import Timeline
from ..router.planner_desk import Deed, Mode, PlannerDesk
from ..router.planning import Advice, Ratio, SeenRequest, Summary, Terms
from .planner_process import PlannerProcess

log = logging.getLogger(__name__)

INTERVAL_S = 2.0  # of a summary
MAX_SEEN = 2000  # requests of one: the latest
MAX_OPEN = 2000  # requests of one: the first and the last
START_S = 30.0  # assumed, until an instance has started


class PlannedFleet(Protocol):
    """The workers, as far as the planner has to know and may change them."""

    def sizes(self) -> Mapping[Role, int]: ...
    def is_settled(self) -> bool:
        """Whether as many workers are ready as are configured, and there are no others."""
        ...

    def start_s(self) -> float | None:
        """Returns how long instances took to start; None if none has."""
        ...

    def resize(self, sizes: Mapping[Role, int]) -> None:
        """Raises PdserveError where that many have no place."""
        ...


class Planning:
    """Runs while the mode is advise or auto. Used on the head's loop."""

    def __init__(self, router: Router, model: LatencyModel, fleet: PlannedFleet, first_number: int) -> None:
        """`first_number` is above the numbers of every earlier head's summaries."""
        self.desk = PlannerDesk(first_number)
        self.terms: Terms | None = None
        self._router = router
        self._model = model
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()
        self._process: PlannerProcess | None = None
        self._stopping: set[asyncio.Task[None]] = set()
        self._seen: deque[SeenRequest] = deque(maxlen=MAX_SEEN)
        self._num_submitted = 0  # up to the last summary
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._in_force: Ratio | None = None

    def configure(self, config: ClusterConfig, terms: Callable[[], Terms]) -> None:
        """Takes over a configuration, and the ratio in it; `terms` is asked only where there is a planner."""
        mode, ratio = Mode(config.planner.mode), self._ratio
        if self._in_force is not None and ratio != self._in_force:
            self.desk.applied(self._in_force, ratio, self._loop.time())
        self._in_force = ratio
        if mode is Mode.OFF:
            self._end()
            return
        self.terms = terms()
        self.desk.configure(mode, self.terms.bounds, ratio)
        if self._process is None:
            self._process = PlannerProcess(self._advised)
            self._seen.clear()
            self._begin_interval()
            self._timer = self._loop.call_later(INTERVAL_S, self._sum_up)

    def closed(self, timeline: Timeline) -> None:
        """Records a request that is over."""
        if self.terms is not None and (request := seen_request(timeline, self.terms)) is not None:
            self._seen.append(request)

    async def close(self) -> None:
        self._end()
        await asyncio.gather(*self._stopping, return_exceptions=True)

    def _end(self) -> None:
        self.terms = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._process is not None:
            stopping = self._loop.create_task(self._process.stop())
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)
            self._process = None
        if self.desk.mode is not Mode.OFF and self.desk.bounds is not None:
            self.desk.configure(Mode.OFF, self.desk.bounds, self._ratio)

    @property
    def _ratio(self) -> Ratio:
        sizes = self._fleet.sizes()
        return Ratio(sizes[Role.PREFILL], sizes[Role.DECODE])

    def _begin_interval(self) -> None:
        counters = self._router.counters
        self._num_submitted = counters.submitted + counters.rejected
        self._since_s = self._loop.time()

    def _sum_up(self) -> None:
        assert self._process is not None and self.terms is not None
        self._timer = self._loop.call_later(INTERVAL_S, self._sum_up)
        counters, now_s = self._router.counters, self._loop.time()
        start_s = self._fleet.start_s()
        summary = Summary(
            number=self.desk.number_summary(),
            at_s=now_s,
            duration_s=now_s - self._since_s,
            num_arrived=counters.submitted + counters.rejected - self._num_submitted,
            seen=tuple(self._seen),
            open=self._router.open_requests(MAX_OPEN),
            ratio=self._ratio,
            is_settled=self._fleet.is_settled(),
            instances=self._router.instance_facts(),
            latency=self._model.learnt,
            knows_latency=self._model.knows_prefill,
            start_s=START_S if start_s is None else start_s,
            terms=self.terms,
        )
        self._seen.clear()
        self._begin_interval()
        self._process.tell(summary)

    def _advised(self, advice: Advice) -> None:
        now_s = self._loop.time()
        last = self.desk.records[-1] if self.desk.records else None
        to = self.desk.receive(advice, now_s, is_settled=self._fleet.is_settled())
        if to is not None:
            try:
                self._fleet.resize(to.sizes)
                assert self.terms is not None
                self._in_force = self._ratio
                self.desk.configure(self.desk.mode, self.terms.bounds, self._in_force)
            except PdserveError as error:
                self.desk.refuse(str(error), now_s)
        if self.desk.records and self.desk.records[-1] is not last:
            record = self.desk.records[-1]
            level = logging.WARNING if record.deed is Deed.REFUSED else logging.INFO
            log.log(
                level,
                "planner: %s -> %s: %s: %s",
                record.made_for,
                record.to,
                record.deed.value,
                record.reason,
            )
