"""By which names a server without keys is asked. Pure.

A web page may be served from a name that afterwards points to this machine (DNS rebinding): its scripts then
reach a server on loopback as one of their own, and only the name in `Host` gives them away. Addresses are not
names, and localhost cannot point elsewhere."""

import ipaddress
import re
from collections.abc import Iterable

_HOST = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")


class AllowedHosts:
    """The names that a request's `Host` may have, beside addresses and localhost."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names) | {"localhost"}

    def __contains__(self, host: str) -> bool:
        """Whether `host`, the header's value, is one of them."""
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
