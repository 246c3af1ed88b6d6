"""The order in which a worker's parts are closed at its end: the process closes them, the simulator models
how long that takes."""

import enum
from collections.abc import Callable, Iterator, Mapping


class Part(enum.Enum):
    ROUTER_LINK = "router link"
    TRANSFERS = "transfers"
    HOST_MONITOR = "host monitor"
    GPU_MONITOR = "GPU monitor"
    GRAMMARS = "grammars"


# the router first: the rest may take seconds, and it need not wait for that
CLOSING_ORDER = (Part.ROUTER_LINK, Part.TRANSFERS, Part.HOST_MONITOR, Part.GPU_MONITOR, Part.GRAMMARS)


def in_closing_order(
    parts: Mapping[Part, Callable[[], object]],
) -> Iterator[tuple[Part, Callable[[], object]]]:
    """Yields the parts that exist, each with the call that closes it."""
    yield from ((part, parts[part]) for part in CLOSING_ORDER if part in parts)
