"""Remembers requests under which workers' processes have died, for when their clients send them again.

A request is recognised by its id or its prompt, with keys by its client as well; a client whose requests have
new ones each time by its convictions. Pure and bounded: the oldest are forgotten first, and all with their
router."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from ..core.errors import KillsWorkers
from ..core.request import Request
from ..core.token_ids import digest

MAX_KEPT = 1024  # requests, at two marks each
REFUSED_S = 600.0  # the first time; doubles with each process that dies of the request again
MAX_REFUSED_S = 86_400.0
CONVICTIONS = 3  # of one client; all that it sends then runs alone first, until the first of them is over
MAX_CONVICTIONS = (
    6  # all that a key sends is refused then; each six of them last twice as long as those before
)


_Mark = tuple[str, bytes]


@dataclass(slots=True)
class _Record:
    num_deaths: int = 0  # with each of which the request was over
    num_proven: int = 0  # of those, while it was there alone
    refused_until_s: float = 0.0


@dataclass(slots=True)
class _Convict:
    num_convictions: int = 0  # ever
    over_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_CONVICTIONS))  # the oldest first


class Deaths:
    """Read when a request comes, written when it is over. A `prompt_digest` is `core.token_ids.digest` of the
    prompt, which a request that was taken over does not have."""

    def __init__(self) -> None:
        self._records: OrderedDict[_Mark, _Record] = OrderedDict()  # the oldest first
        self._convicts: OrderedDict[str, _Convict] = OrderedDict()  # by client, the oldest first

    def suspect(self, request: Request, prompt_digest: bytes) -> None:
        """A process died under the request, which is over without having been cleared."""
        self._record(request, prompt_digest).num_deaths += 1

    def convict(self, request: Request, prompt_digest: bytes, now_s: float) -> None:
        """A process died while the request was there alone."""
        record = self._record(request, prompt_digest)
        record.num_deaths += 1
        record.num_proven += 1
        record.refused_until_s = now_s + _refused_s(record.num_proven - 1)
        if client := request.client:
            convict = self._convicts.setdefault(client, _Convict())
            over_s = now_s + _refused_s(convict.num_convictions // MAX_CONVICTIONS)
            convict.over_s.append(max(over_s, record.refused_until_s))
            convict.num_convictions += 1
            self._convicts.move_to_end(client)
            if len(self._convicts) > MAX_KEPT:
                self._convicts.popitem(last=False)

    def num_under(self, request: Request, now_s: float) -> int:
        """Returns how many processes have died under requests like this one, or of a client whose requests
        kill one after the other: it has to run alone first if any has. Raises KillsWorkers for a convicted
        request, or one of a key with too many of these, until its time is over. An address may be that of
        many, as a proxy's is, and is not refused."""
        records = self._known(_marks(request, digest(request.prompt_token_ids))) if self._records else []
        refused_until_s = max((record.refused_until_s for record in records), default=now_s)
        if now_s < refused_until_s:
            raise KillsWorkers("this request", refused_until_s - now_s)
        convict = self._convicts.get(request.client)
        in_force_s = [over_s for over_s in convict.over_s if now_s < over_s] if convict else []
        if len(in_force_s) == MAX_CONVICTIONS and _key(request):
            raise KillsWorkers(f"{MAX_CONVICTIONS} requests of this client", min(in_force_s) - now_s)
        num_deaths = len(in_force_s) if len(in_force_s) >= CONVICTIONS else 0
        return max((record.num_deaths for record in records), default=0) or num_deaths

    def clear(self, request: Request, prompt_digest: bytes) -> None:
        """The request has run alone, and nothing died. What has been proven once is not forgotten."""
        for mark in _marks(request, prompt_digest) if self._records else ():
            if mark in self._records and not self._records[mark].num_proven:
                del self._records[mark]

    def _known(self, marks: tuple[_Mark, _Mark]) -> list[_Record]:
        return [self._records[mark] for mark in marks if mark in self._records]

    def _record(self, request: Request, prompt_digest: bytes) -> _Record:
        marks = _marks(request, prompt_digest)
        record = max(self._known(marks), key=lambda record: record.num_deaths, default=_Record())
        for mark in marks:
            self._records[mark] = record
            self._records.move_to_end(mark)
        while len(self._records) > 2 * MAX_KEPT:
            self._records.popitem(last=False)
        return record


def _refused_s(num_before: int) -> float:
    return min(REFUSED_S * 2.0 ** min(num_before, 16), MAX_REFUSED_S)


def _key(request: Request) -> str:
    """Returns the request's client; "" for an address, which may be that of many, as a proxy's is."""
    return request.client if request.client.startswith("key:") else ""


def _marks(request: Request, prompt_digest: bytes) -> tuple[_Mark, _Mark]:
    """Returns the two marks by which the request is recognised."""
    client = _key(request)
    return (client, b"id " + request.request_id.encode()), (client, b"prompt " + prompt_digest)
