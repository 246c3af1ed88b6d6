"""API keys: the parser of the key file, and the lookup of a client's key. Pure: text in, keys out.

A line of the file is a name, the SHA-256 of a key, and its permissions and limits: `alice sha256:9f86...
tokens_per_minute=60000`. Keys are 256 random bits that `pdserve key new` draws, so a fast hash hides them as
well as a slow one would: there is no dictionary to try, so every call can stay cheap."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.errors import ConfigError

PREFIX = "pdk_"  # lets secret scanners find keys that were left in source code
KEY_CHARS = len(PREFIX) + 43
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_KEYS = 10_000
MAX_LIMIT = 10**12
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
MAX_WEIGHT = 1000
PRIORITIES = range(-1000, 1001)
_LIMITS = ("requests_per_minute", "tokens_per_minute")
_NUMBERS = ("min_priority", "weight", *_LIMITS)
_FLAGS = ("admin", "metrics")
_EXPECTED = (
    "a name, sha256:HASH, then any of admin, metrics, group=NAME, min_priority=N, weight=N,"
    " requests_per_minute=N and tokens_per_minute=N"
)
_EXPECTED_NAME = "at most 64 letters, digits, dots, dashes and underscores"


@dataclass(frozen=True)
class ApiKey:
    """A key's name, permissions and limits. A name may have several keys, so that keys can be rotated."""

    name: str
    digest: bytes
    is_admin: bool = False
    is_scraper: bool = False  # marked `metrics`: it may read those of the whole cluster
    group: str | None = None  # keys of one group may share cached prefixes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    min_priority: int | None = None  # the lowest number, served first, that its requests may ask for; None: 0
    weight: int | None = None  # under load its client gets this many times the tokens of one without

    @property
    def may_read_metrics(self) -> bool:
        return self.is_admin or self.is_scraper

    @property
    def line(self) -> str:
        """The entry as it stands in the file."""
        flags = ["admin"] * self.is_admin + ["metrics"] * self.is_scraper
        values = [
            f"{name}={value}" for name in ("group", *_NUMBERS) if (value := getattr(self, name)) is not None
        ]
        return " ".join([self.name, f"sha256:{self.digest.hex()}", *flags, *values])


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """All accepted keys. The time of a lookup leaks nothing about them: it compares hashes, of which a client
    without the key cannot choose any part, and entries with the same prefix are compared in constant time."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        keys = tuple(keys)
        self.names = tuple(dict.fromkeys(key.name for key in keys))
        self._by_beginning: dict[bytes, list[ApiKey]] = {}
        for key in keys:
            self._by_beginning.setdefault(key.digest[:4], []).append(key)

    def find(self, shown: str) -> ApiKey | None:
        return self.of_digest(digest_of(shown)) if len(shown) == KEY_CHARS else None

    def of_digest(self, digest: bytes) -> ApiKey | None:
        found = None
        for key in self._by_beginning.get(digest[:4], ()):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def parse_keys(text: str, filename: str) -> tuple[ApiKey, ...]:
    """Parses the keys in `text`. Raises ConfigError, with a line per mistake. No message quotes the file's
    content: it may be a key."""
    keys, problems = list[ApiKey](), list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            keys.append(_key_of(words))
        except ValueError as error:
            problems.append(f"{filename}:{number}: {error}")
    if len({key.digest for key in keys}) < len(keys):
        problems.append(f"{filename}: the same hash stands in two lines, expected one line a key")
    if len(keys) > MAX_KEYS:
        problems.append(f"{filename}: {len(keys)} keys, expected {MAX_KEYS} at most")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(keys)


def make_key(
    name: str,
    key: str,
    is_admin: bool = False,
    is_scraper: bool = False,
    group: str | None = None,
    **limits: int | None,
) -> ApiKey:
    """Raises ValueError if a name or a limit is not valid."""
    flags = ["admin"] * is_admin + ["metrics"] * is_scraper
    values = [f"{word}={value}" for word, value in {"group": group, **limits}.items() if value is not None]
    return _key_of([name, f"sha256:{digest_of(key).hex()}", *flags, *values])


def _key_of(words: list[str]) -> ApiKey:
    name, digest = words[0], _DIGEST.fullmatch(words[1]) if len(words) > 1 else None
    if digest is None:
        raise ValueError(f"no sha256: and 64 hexadecimal digits in the second place, expected {_EXPECTED}")
    if NAME.fullmatch(name) is None:
        raise ValueError(f"the name is not valid, expected {_EXPECTED_NAME}")
    given: dict[str, str] = {}
    for word in words[2:]:
        label, has_value, value = word.partition("=")
        is_known = label in ("group", *_NUMBERS) if has_value else label in _FLAGS
        if not is_known or label in given:
            raise ValueError(f"a word that is not known or stands there twice, expected {_EXPECTED}")
        given[label] = value
    group = given.get("group")
    if group is not None and NAME.fullmatch(group) is None:
        raise ValueError(f"group: not valid, expected {_EXPECTED_NAME}")
    numbers = {label: _number(label, given[label]) for label in _NUMBERS if label in given}
    return ApiKey(name, bytes.fromhex(digest[1]), "admin" in given, "metrics" in given, group, **numbers)


def _number(label: str, value: str) -> int:
    allowed = {"min_priority": PRIORITIES, "weight": range(1, MAX_WEIGHT + 1)}.get(
        label, range(1, MAX_LIMIT + 1)
    )
    digits = value.removeprefix("-") if label == "min_priority" else value
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 13 and int(value) in allowed):
        raise ValueError(f"{label}: not valid, expected {allowed[0]} to {allowed[-1]}")
    return int(value)
