"""How a worker ends: the order in which its parts are closed, by the process and in the simulator, which
models how long that takes; or at once."""

import enum
import logging
import os
from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)


class Part(enum.Enum):
    ROUTER_LINK = "router link"
    TRANSFERS = "transfers"
    HOST_MONITOR = "host monitor"
    GPU_MONITOR = "GPU monitor"
    GRAMMARS = "grammars"
    RANKS = "ranks"


# the router first: the rest may take seconds, and it need not wait for that
CLOSING_ORDER = (
    Part.ROUTER_LINK,
    Part.TRANSFERS,
    Part.RANKS,
    Part.HOST_MONITOR,
    Part.GPU_MONITOR,
    Part.GRAMMARS,
)


def in_closing_order(
    parts: Mapping[Part, Callable[[], object]],
) -> Iterator[tuple[Part, Callable[[], object]]]:
    """Yields the parts that exist, each with the call that closes it."""
    yield from ((part, parts[part]) for part in CLOSING_ORDER if part in parts)


def give_up(why: str) -> None:
    """Ends this process immediately, whatever its threads hang in; the cluster starts another."""
    log.critical("%s: this worker ends", why)
    logging.shutdown()
    os._exit(1)
