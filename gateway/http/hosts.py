"""The host names accepted by a server without keys. Pure.

A web page may be served from a name that later resolves to this machine (DNS rebinding): its scripts then
reach a server on loopback as same-origin, and only the name in `Host` reveals them. IP addresses are not
names, and localhost cannot resolve elsewhere."""

import ipaddress
import re
from collections.abc import Iterable

_HOST = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")


class AllowedHosts:
    """The names that a request's `Host` may have, besides addresses and localhost."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names) | {"localhost"}

    def __contains__(self, host: str) -> bool:
        """Returns whether `host`, the header's value, is accepted."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match["host"].lower()
        return name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
