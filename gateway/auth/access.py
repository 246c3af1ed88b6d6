"""Decides which client is admitted, under which name and with which quota: one object for all servers of a
cluster.

A server calls `admit` with the client's credentials before it reads the request, and `charge` before it does
any of the work. Key names identify the clients that take turns and that own cached prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ...core.errors import PdserveError
from .cost import Charge, RequestPrice
from .key_file import KeyFile
from .keys import ApiKey, KeyRing
from .rate_limit import TokenBucket

BEARER = "bearer "
CacheSharing = Literal["key", "group", "all"]


class RequiredAccess(Enum):
    """The access that a call requires."""

    NOTHING = "nothing"  # health: load balancers have no keys
    KEY = "key"
    REQUEST = "request"  # a key, and room in its rate limit
    METRICS = "metrics"  # a key that may read the metrics of the whole cluster
    ADMIN = "admin"


class Unauthenticated(PdserveError):
    """The key is missing or unknown."""


class Revoked(Unauthenticated):
    """The key was revoked while its call was open."""


class NotPermitted(PdserveError):
    """The key is known but lacks permission for this call."""


class RateLimited(PdserveError):
    """A key has exhausted its quota per minute; retry after `retry_after_s`."""

    def __init__(self, name: str, limit: str, value: int, retry_after_s: float) -> None:
        super().__init__(f"{name}: {limit} is {value}, retry in {retry_after_s:.1f} s")
        self.limit = limit
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Caller:
    """A client that was admitted by its key."""

    key: ApiKey

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def client(self) -> str:
        """The client that its requests count for when clients take turns; nothing that a client sends can
        change it."""
        return f"key:{self.name}"

    @property
    def weight(self) -> float:
        """The client's share of the tokens under load, beside clients of weight 1."""
        return float(self.key.weight or 1)

    @property
    def min_priority(self) -> int:
        """The lowest number that its requests may have as their priority."""
        return self.key.min_priority or 0

    def scoped(self, request_id: str) -> str:
        """The internal id of a request: two clients may choose the same id, and neither may claim the
        other's."""
        return f"{self.name}/{request_id}"


def cache_scope(caller: Caller | None, sharing: CacheSharing) -> str:
    """The scope within which requests share cached prefixes. Without keys, all clients share one."""
    if caller is None or sharing == "all":
        return "all"
    if sharing == "group" and caller.key.group is not None:
        return f"group:{caller.key.group}"
    return f"key:{caller.name}"


def scoped_salt(scope: str, cache_salt: str) -> str:
    """The internal salt: no name contains a slash, so no salt that a client sends reaches another scope."""
    return f"{scope}/{cache_salt}"


class Access:
    """The keys in a file, and the usage of each."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        self._file = KeyFile(path)
        self._ring = KeyRing(self._file.keys)
        self._buckets: dict[tuple[str, str, int], TokenBucket] = {}  # (name, limit, per minute)
        self.version = 0  # the number of times the keys have changed

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the keys in force, each once."""
        return self._ring.names

    def look(self, now_s: float) -> None:
        """Adopts the file's keys if they have changed."""
        if not self._file.look(now_s):
            return
        self.version += 1
        self._ring = KeyRing(self._file.keys)
        if self._file.keys:  # else the file is missing and may return: usage is kept
            living = set(self._ring.names)
            self._buckets = {which: bucket for which, bucket in self._buckets.items() if which[0] in living}

    def admit(self, need: RequiredAccess, authorization: str | None, now_s: float) -> Caller | None:
        """Returns the client whose key `authorization` (the header's value) holds; None if no key is needed
        and no known one is given.

        Raises Unauthenticated, NotPermitted or RateLimited."""
        self.look(now_s)
        key = self._ring.find(_shown(authorization))
        if need is RequiredAccess.NOTHING:
            return None if key is None else Caller(key)
        if key is None:
            raise Unauthenticated("authorization: not a key of this server, expected `Bearer KEY`")
        _check_marks(key, need)
        if need is RequiredAccess.REQUEST:
            self._take(key, "requests_per_minute", 1, now_s)
        return Caller(key)

    def check_still(self, caller: Caller, need: RequiredAccess) -> None:
        """Checks that an admitted call may continue under the keys that the last `look` found. Raises Revoked
        or NotPermitted."""
        if need is RequiredAccess.NOTHING:
            return
        key = self._ring.of_digest(caller.key.digest)
        if key is None or key.name != caller.name:
            raise Revoked(f"{caller.name}: the key of this call was revoked")
        _check_marks(key, need)

    def charge(self, caller: Caller | None, prices: Sequence[RequestPrice], now_s: float) -> list[Charge]:
        """Charges a call's full price, in both rates, before any work is done; `admit` has counted its first
        request.

        Raises RateLimited, and then charges nothing."""
        if caller is None:
            return [Charge.free() for _ in prices]
        num_tokens = sum(price.tokens(price.num_prompt_tokens, price.max_output_tokens) for price in prices)
        bucket = self._take(caller.key, "tokens_per_minute", num_tokens, now_s)
        try:
            num_requests = sum(price.num_choices for price in prices)
            self._take(caller.key, "requests_per_minute", num_requests, now_s, already=1)
        except RateLimited:
            if bucket is not None:
                bucket.give_back(num_tokens, now_s)
            raise
        return [Charge(price, bucket) for price in prices]

    def _take(
        self, key: ApiKey, limit: str, amount: int, now_s: float, already: int = 0
    ) -> TokenBucket | None:
        per_minute: int | None = getattr(key, limit)
        if per_minute is None:
            return None
        bucket = self._buckets.setdefault((key.name, limit, per_minute), TokenBucket(per_minute, now_s))
        delay_s = bucket.take(amount, now_s, already)
        if delay_s > 0:
            raise RateLimited(key.name, limit, per_minute, delay_s)
        return bucket


def _check_marks(key: ApiKey, need: RequiredAccess) -> None:
    if need is RequiredAccess.ADMIN and not key.is_admin:
        raise NotPermitted(
            f"{key.name}: this key may not administer the cluster, expected one that is marked admin"
        )
    if need is RequiredAccess.METRICS and not key.may_read_metrics:
        raise NotPermitted(
            f"{key.name}: this key may not read metrics, expected one that is marked metrics or admin"
        )


def _shown(authorization: str | None) -> str:
    """The key in `Bearer KEY`, or an empty string."""
    if authorization is None or authorization[: len(BEARER)].lower() != BEARER:
        return ""
    return authorization[len(BEARER) :].strip()
