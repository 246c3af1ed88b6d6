"""Which web pages' scripts may use this server (CORS, as in https://fetch.spec.whatwg.org). Pure.

A browser asks by a preflight request, without a key, before it sends JSON or a key for a page of another
origin, and shows the page an answer only if the answer permits it. Neither is a check of who a client is."""

import re
from collections.abc import Collection, Iterable

Header = tuple[bytes, bytes]

ANY = "*"
METHODS = b"GET, HEAD, POST"
EXPOSED = b"x-request-id, retry-after, retry-after-ms"
MAX_AGE_S = b"600"
_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")


class AllowedOrigins:
    """The origins of pages that may use this server."""

    def __init__(self, origins: Collection[str]) -> None:
        self._allows_any = ANY in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Iterable[Header]) -> list[Header]:
        """Returns the headers that the answer to a request with these headers needs."""
        origin = dict(request).get(b"origin") if self._origins else None
        if origin is None:
            return []
        if self._allows_any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
        vary = (b"vary", b"origin")
        if origin not in self._origins:
            return [vary]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED),
            vary,
        ]

    def preflight(self, method: str, request: Iterable[Header]) -> list[Header] | None:
        """Returns the headers of the answer to a preflight request from an allowed origin, beside those of
        any answer; None for any other request."""
        if method != "OPTIONS" or not self._origins:
            return None
        headers = dict(request)
        is_allowed = headers.get(b"origin") in self._origins or (self._allows_any and b"origin" in headers)
        if not is_allowed or b"access-control-request-method" not in headers:
            return None
        answer = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", MAX_AGE_S)]
        names = headers.get(b"access-control-request-headers", b"")
        if _NAMES.fullmatch(names):
            answer.append((b"access-control-allow-headers", names))
        if headers.get(b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer
