"""Who may come in, as whom, and how much of it: one object for all doors.

A door calls `admit` with what the client showed before it reads what the client wants, and `charge` before it hands a request
to the router. Names of keys are the clients that take turns there.
"""

import logging
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..core.errors import ConfigError, PdserveError
from ..core.request import Request
from .keys import ApiKey, KeyRing, parse_keys
from .rate_limit import TokenBucket

log = logging.getLogger(__name__)

RELOAD_S = 1.0  # at most so often is the file looked at
MAX_FILE_BYTES = 4 << 20
BEARER = "bearer "


class Need(Enum):
    """What a call asks of its client."""

    NOTHING = "nothing"  # health: load balancers have no keys
    KEY = "key"
    REQUEST = "request"  # a key, and a place in its rate
    ADMIN = "admin"


class Unauthenticated(PdserveError):
    """No key, or none that is known."""


class NotPermitted(PdserveError):
    """The key is known, but not for this."""


class RateLimited(PdserveError):
    """A key has used up what it may per minute; retry after `retry_after_s`."""

    def __init__(self, name: str, limit: str, value: int, retry_after_s: float) -> None:
        super().__init__(f"{name}: {limit} is {value}, retry in {retry_after_s:.1f} s")
        self.limit = limit
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Caller:
    """A client that was let in by its key."""

    key: ApiKey

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def client(self) -> str:
        """Whom its requests count for when clients take turns; nothing that a client says can make it another's."""
        return f"key:{self.name}"

    def scoped(self, request_id: str) -> str:
        """A request's id inside: two clients may give the same, and neither may claim the other's."""
        return f"{self.name}/{request_id}"


@dataclass
class Charge:
    """Tokens that a request has taken of its key's rate before it began: its prompt, and all that it may produce."""

    bucket: TokenBucket | None
    num_prompt_tokens: int
    max_output_tokens: int

    def settle(self, num_output_tokens: int, now_s: float, has_begun: bool = True) -> None:
        """Give back what was not produced; everything, when the request was refused before it began. Once."""
        if self.bucket is not None:
            unused = max(0, self.max_output_tokens - num_output_tokens)
            self.bucket.give_back(unused + (0 if has_begun else self.num_prompt_tokens), now_s)
            self.bucket = None


class Access:
    """The keys in a file, read again when it changes. A file that is wrong then leaves the keys before it in force."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        self._path = Path(path).expanduser()
        self._stamp = _stamp(self._path)
        self._ring = KeyRing(_read(self._path))
        self._looked_s = float("-inf")
        self._buckets: dict[tuple[str, str, int], TokenBucket] = {}  # (name, limit, per minute)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the keys that are let in, each once."""
        return self._ring.names

    def admit(self, need: Need, authorization: str | None, now_s: float) -> Caller | None:
        """Who shows `authorization` (the header's value), or None where nobody needs to. Raises Unauthenticated, NotPermitted
        or RateLimited."""
        if need is Need.NOTHING:
            return None
        self._reload(now_s)
        key = self._ring.find(_shown(authorization))
        if key is None:
            raise Unauthenticated("authorization: not a key of this server, expected `Bearer KEY`")
        if need is Need.ADMIN and not key.is_admin:
            raise NotPermitted(f"{key.name}: this key may not administer the cluster, expected one that is marked admin")
        if need is Need.REQUEST:
            self._take(key, "requests_per_minute", 1, now_s)
        return Caller(key)

    def charge(self, caller: Caller | None, request: Request, now_s: float) -> Charge:
        """Take a validated request's tokens of its key's rate; the door settles it when the request ends.

        Raises RateLimited."""
        num_prompt, sampling = len(request.prompt_token_ids), request.sampling
        max_output = sampling.n * sampling.max_tokens
        bucket = None
        if caller is not None:
            bucket = self._take(caller.key, "tokens_per_minute", num_prompt + max_output, now_s)
        return Charge(bucket, num_prompt, max_output)

    def _take(self, key: ApiKey, limit: str, amount: int, now_s: float) -> TokenBucket | None:
        per_minute: int | None = getattr(key, limit)
        if per_minute is None:
            return None
        bucket = self._buckets.setdefault((key.name, limit, per_minute), TokenBucket(per_minute, now_s))
        delay_s = bucket.take(amount, now_s)
        if delay_s > 0:
            raise RateLimited(key.name, limit, per_minute, delay_s)
        return bucket

    def _reload(self, now_s: float) -> None:
        if now_s - self._looked_s < RELOAD_S:
            return
        self._looked_s = now_s
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # also when it fails: what is wrong is said once
        try:
            keys = _read(self._path)
        except ConfigError as error:
            log.error("%s; going on with the keys that were there before", error)
            return
        self._ring = KeyRing(keys)
        living = {key.name for key in keys}
        self._buckets = {which: bucket for which, bucket in self._buckets.items() if which[0] in living}
        log.info("listen.api_keys: took over %d keys", len(keys))


def _shown(authorization: str | None) -> str:
    """The key in `Bearer KEY`, or nothing."""
    if authorization is None or authorization[: len(BEARER)].lower() != BEARER:
        return ""
    return authorization[len(BEARER) :].strip()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[ApiKey, ...]:
    where = f"listen.api_keys: got {str(path)!r}, expected"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{where} a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} a text in UTF-8") from error
    if mode & 0o022:
        raise ConfigError(f"{where} a file that nobody but its owner can write (chmod go-w)")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{where} at most {MAX_FILE_BYTES} bytes")
    return parse_keys(text, str(path))
