"""Decides which links close because nothing needs them. Pure: the hub asks in production and in the
simulator."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

K = TypeVar("K")


class LinkUse(NamedTuple):
    """A link that is open or being opened, as one end sees it."""

    used_s: float  # when it was opened, or its last transfer ended
    is_busy: bool  # it has a transfer, or is being opened for one


def unused_links(links: Mapping[K, LinkUse], max_links: int, max_idle_s: float, now_s: float) -> list[K]:
    """Returns those that have been idle for too long, and the least recently used ones beyond `max_links`. A
    busy link is never among them: while more than `max_links` are busy, that many stay open."""
    idle = sorted((key for key, use in links.items() if not use.is_busy), key=lambda key: links[key].used_s)
    num_surplus = len(links) - max_links
    return [
        key for index, key in enumerate(idle) if index < num_surplus or now_s - links[key].used_s > max_idle_s
    ]
