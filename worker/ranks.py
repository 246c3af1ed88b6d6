"""The other ranks of a worker, as its rank 0 sees them: it gathers them, waits until they have loaded, and
carries their transfers' messages."""

import threading
from collections.abc import Callable, Mapping

from ..engine.checkpoint import fingerprint, resolve_model_path
from .rank_links import RankLinks
from .rank_meeting import RankMeeting, meeting_point, welcome
from .rank_messages import Loaded, Loading, RankMessage, Said
from .spec import WorkerSpec


def loads_of(spec: WorkerSpec) -> Mapping[str, str]:
    """Returns what a rank will load, by name. Raises CheckpointError."""
    path = resolve_model_path(spec.config.model.path)
    return {"model.path": str(path), "checkpoint": fingerprint(path)}


class Ranks:
    """Ranks 1 and above. `progress` may be asked for from any thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        descriptors: Mapping[int, list[int]],
        is_over: Callable[[], bool],
        on_lost: Callable[[str], None],
    ) -> None:
        """Waits until all have joined, and passes each its descriptors of shared memory. `on_lost` is called
        with the reason why the instance has to end. Raises ConfigError for a rank that would load something
        else, OSError when one does not come, or when `is_over`."""
        meeting = RankMeeting(spec.token, meeting_point(spec.token, *spec.key))
        sockets = meeting.gather(spec.num_ranks, loads_of(spec), is_over)
        for rank, sock in sockets.items():
            welcome(sock, descriptors[rank])
        self._fractions = dict.fromkeys(sockets, 0.0)
        self._loaded: dict[int, Loaded] = {}
        self._changed = threading.Condition()
        self._on_said: Callable[[int, bytes], None] = lambda rank, data: None
        self._links = RankLinks(sockets, self._on_message, on_lost)
        self._links.start()

    @property
    def fraction(self) -> float:
        """The fraction of their weights that the slowest has read."""
        return min(self._fractions.values())

    def wait_until_loaded(self, on_said: Callable[[int, bytes], None]) -> list[Loaded]:
        """Returns what ranks 1, 2, ... report of themselves. Later messages of their transfers go to
        `on_said`, on the links' thread. A rank that fails ends the instance instead."""
        self._on_said = on_said
        with self._changed:
            self._changed.wait_for(lambda: len(self._loaded) == len(self._fractions))
        return [self._loaded[rank] for rank in sorted(self._loaded)]

    def leave(self) -> None:
        """Ends them in order."""
        self._links.leave()

    def _on_message(self, rank: int, message: RankMessage) -> None:
        match message:
            case Said(data):
                self._on_said(rank, data)
            case Loading(fraction):
                self._fractions[rank] = fraction
            case Loaded():
                with self._changed:
                    self._loaded[rank] = message
                    self._changed.notify_all()
