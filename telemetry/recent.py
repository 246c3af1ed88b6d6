"""The timelines of the newest ended requests, for `pdserve explain` and `requests`: as many as fit."""

from collections import OrderedDict
from itertools import islice

import msgspec

from ..router.events import Timeline

MAX_REQUESTS = 4096
MAX_BYTES = 8 << 20


class RecentRequests:
    """Timelines by request id; a reused id refers to the last request. Kept packed, so that the bound on
    bytes is exact."""

    def __init__(self, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        self.num_bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._packed: OrderedDict[str, bytes] = OrderedDict()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Timeline)

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, timeline: Timeline) -> None:
        """Adds a timeline, evicting the oldest."""
        packed = self._encoder.encode(timeline)
        self._forget(timeline.request_id)
        self._packed[timeline.request_id] = packed
        self.num_bytes += len(packed)
        while len(self._packed) > self._max_requests or self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._packed)))

    def get(self, request_id: str) -> Timeline | None:
        packed = self._packed.get(request_id)
        return None if packed is None else self._decoder.decode(packed)

    def latest(self, max_requests: int, scope: str = "") -> list[Timeline]:
        """Returns those whose ids begin with `scope`, the last to end first."""
        packed = (packed for name, packed in reversed(self._packed.items()) if name.startswith(scope))
        return [self._decoder.decode(one) for one in islice(packed, max_requests)]

    def _forget(self, request_id: str) -> None:
        self.num_bytes -= len(self._packed.pop(request_id, b""))
