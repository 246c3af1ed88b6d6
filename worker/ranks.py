"""The other ranks of a worker, as its rank 0 sees them: it gathers them, waits until they have loaded, and
carries the messages of their transfers."""

import threading
from collections.abc import Callable
from contextlib import suppress

from ..engine.parallel.group import RankGroup, RankLost
from ..engine.parallel.steps import FIRST_FREE_KIND
from .rank_links import RankLinks
from .rank_meeting import RankMeeting, meeting_point
from .rank_messages import Loaded, RankMessage, Said
from .spec import WorkerSpec

OnSaid = Callable[[int, bytes], None]


class Ranks:
    """Ranks 1 and above of the instance, and the group that they form with this process."""

    def __init__(self, spec: WorkerSpec, is_over: Callable[[], bool], on_lost: Callable[[str], None]) -> None:
        """Waits until all have joined. `on_lost` is called with the reason why the instance is over. Raises
        OSError when one does not come, or `is_over`."""
        self.group = RankGroup.create(spec.num_ranks)
        meeting = RankMeeting(spec.token, meeting_point(spec.token, *spec.key))
        sockets = meeting.gather(spec.num_ranks, self.group.address, is_over)
        self._num_others = len(sockets)
        self._loaded: dict[int, Loaded] = {}
        self._changed = threading.Condition()  # guards the one above
        self._on_said: OnSaid = lambda rank, data: None
        self._links = RankLinks(sockets, self._on_message, on_lost)
        self._links.start()

    @property
    def cpu_s(self) -> tuple[float, ...]:
        """The processor time of ranks 1, 2, ..., as they have reported it."""
        return tuple(self._links.cpu_s[rank] for rank in sorted(self._links.cpu_s))

    def command(self, rank: int, data: bytes) -> None:
        """Sends a message to the transfers of a rank, behind all steps before it. Any thread. Raises
        RankLost."""
        self.group.send(FIRST_FREE_KIND + rank, data)

    def when_loaded(self, on_said: OnSaid) -> list[Loaded]:
        """Returns what ranks 1, 2, ... report of themselves when they have loaded. Messages of their
        transfers go to `on_said` from now on. A rank that fails ends the instance instead."""
        self._on_said = on_said
        with self._changed:
            self._changed.wait_for(lambda: len(self._loaded) == self._num_others)
        return [self._loaded[rank] for rank in sorted(self._loaded)]

    def leave(self) -> None:
        """Ends them in order, behind the last step."""
        with suppress(RankLost):
            self.group.stop()
        self._links.leave()
        self.group.close()

    def _on_message(self, rank: int, message: RankMessage) -> None:
        match message:
            case Said(data):
                self._on_said(rank, data)
            case Loaded():
                with self._changed:
                    self._loaded[rank] = message
                    self._changed.notify_all()
