"""A bounded number of places, shared fairly among groups: decides which holder gets one, and which one loses
its place for it. Pure.

Connections and keyless calls are holders; the addresses they come from are groups. When places run out, a new
holder takes the place of the oldest evictable one in the group that has most of these. So clients that take
many places lose them to those that take few. Holders that are in use keep their places within their group's
share of them; so none can keep others out, neither by holding places without using them nor by using all."""

import ipaddress
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Generic, TypeVar

from ..core.errors import PdserveError
from ..core.held_bytes import Shares

Holder = TypeVar("Holder", bound=Hashable)
NAMES_KEPT = 1024  # of hosts and connections: each call of a client asks for its own again


class NoPlace(PdserveError):
    """All places are taken, and none of them may be evicted for this holder. Retry after `retry_after_s`."""

    def __init__(self, what: str, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{limit} {what} are open already, retry in {retry_after_s:.1f} s")
        self.limit = limit
        self.retry_after_s = retry_after_s


class FairPlaces(Generic[Holder]):
    """Holders are evictable, in the order in which they arrived or were last in use, unless they are kept: in
    use, and within their group's share of `Shares` when that began."""

    def __init__(self, what: str, max_places: int, max_per_group: int) -> None:
        assert 0 < max_per_group <= max_places
        self.what = what
        self.max_places = max_places
        self.max_per_group = max_per_group
        self._group_of: dict[Holder, str] = {}
        self._num_held: dict[str, int] = {}  # by group, including those in use
        self._num_uses: Counter[Holder] = Counter()
        self._kept: set[Holder] = set()
        self._shares = Shares(max_places, num_spare=1)  # of those kept, by group
        self._evictable: dict[str, dict[Holder, None]] = {}  # by group, oldest first; no group is empty
        self._by_size: dict[int, dict[str, None]] = {}  # groups by their number of evictable holders
        self._largest = 0  # an upper bound of the keys of `_by_size`

    def __len__(self) -> int:
        return len(self._group_of)

    def __contains__(self, holder: Holder) -> bool:
        return holder in self._group_of

    def holders(self) -> Iterable[Holder]:
        """All holders of a place; not to be iterated over while places change."""
        return self._group_of.keys()

    def take(self, group: str, holder: Holder) -> Holder | None:
        """Gives `holder` a place; returns the holder that was evicted for it, if any. Raises NoPlace."""
        assert holder not in self._group_of, "a holder has one place"
        evicted = None
        if self._num_held.get(group, 0) >= self.max_per_group:
            evicted = self._oldest(group, self.max_per_group)
        elif len(self._group_of) >= self.max_places:
            evicted = self._oldest(self._largest_group(group), self.max_places)
        if evicted is not None:
            self.leave(evicted)
        self._group_of[holder] = group
        self._num_held[group] = self._num_held.get(group, 0) + 1
        self._settle(holder)
        return evicted

    @contextmanager
    def in_use(self, holder: Holder) -> Iterator[None]:
        """Wraps a use of the place, of which there may be several at once: meanwhile it is not evicted unless
        its group has more in use than its share. Afterwards it is evictable again, as its group's youngest.
        The holder need not have a place yet, and may have lost it."""
        self._num_uses[holder] += 1
        self._settle(holder)
        try:
            yield
        finally:
            self._num_uses[holder] -= 1
            if not self._num_uses[holder]:
                del self._num_uses[holder]
            self._settle(holder)

    def is_in_use(self, holder: Holder) -> bool:
        return bool(self._num_uses.get(holder))

    def leave(self, holder: Holder) -> None:
        """Returns the place; idempotent."""
        group = self._group_of.get(holder)
        if group is None:
            return
        if holder in self._kept:
            self._release(group, holder)
        else:
            self._remove_evictable(group, holder)
        del self._group_of[holder]
        self._num_held[group] -= 1
        if not self._num_held[group]:
            del self._num_held[group]

    def check_integrity(self) -> None:
        """Raises AssertionError if the counts disagree."""
        held: dict[str, int] = {}
        for group in self._group_of.values():
            held[group] = held.get(group, 0) + 1
        assert held == self._num_held
        assert len(self._group_of) <= self.max_places and max(held.values(), default=0) <= self.max_per_group
        sizes = {group: len(holders) for group, holders in self._evictable.items()}
        assert all(sizes.values()) and {g: n for n, groups in self._by_size.items() for g in groups} == sizes
        assert self._largest >= max(sizes.values(), default=0)
        for group, holders in self._evictable.items():
            assert all(self._group_of[holder] == group for holder in holders)
        assert self._kept <= self._num_uses.keys()
        assert self._kept | {h for holders in self._evictable.values() for h in holders} == set(
            self._group_of
        )
        assert Counter(self._group_of[holder] for holder in self._kept) == {
            group: self._shares.of(group) for group in self._num_held if self._shares.of(group)
        }

    def _settle(self, holder: Holder) -> None:
        """Keeps a holder with a place that has come into use; one whose use is over becomes evictable, as the
        youngest."""
        group = self._group_of.get(holder)
        if group is None or (holder in self._kept and self._num_uses.get(holder)):
            return
        if holder in self._kept:
            self._release(group, holder)
        elif holder in self._evictable.get(group, ()):
            self._remove_evictable(group, holder)
        if self._num_uses.get(holder) and self._shares.take(group, 1):
            self._kept.add(holder)
        else:
            self._add_evictable(group, holder)

    def _release(self, group: str, holder: Holder) -> None:
        self._kept.remove(holder)
        self._shares.give_back(group, 1)

    def _oldest(self, group: str | None, limit: int) -> Holder:
        if group is None or group not in self._evictable:
            raise NoPlace(self.what, limit)
        return next(iter(self._evictable[group]))

    def _largest_group(self, preferred: str) -> str | None:
        """Returns the group with most evictable holders; `preferred` if it is among several."""
        while self._largest and not self._by_size.get(self._largest):
            self._largest -= 1
        groups = self._by_size.get(self._largest, {})
        return preferred if preferred in groups else next(iter(groups), None)

    def _add_evictable(self, group: str, holder: Holder) -> None:
        holders = self._evictable.setdefault(group, {})
        self._resize(group, len(holders), len(holders) + 1)
        holders[holder] = None

    def _remove_evictable(self, group: str, holder: Holder) -> None:
        holders = self._evictable[group]
        self._resize(group, len(holders), len(holders) - 1)
        del holders[holder]
        if not holders:
            del self._evictable[group]

    def _resize(self, group: str, before: int, after: int) -> None:
        if before:
            del self._by_size[before][group]
            if not self._by_size[before]:
                del self._by_size[before]
        if after:
            self._by_size.setdefault(after, {})[group] = None
            self._largest = max(self._largest, after)


@lru_cache(NAMES_KEPT)
def address_group(host: str) -> str:
    """Returns the group of addresses that one client is likely to have: all of loopback, an IPv6 /64 network,
    else the address itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return "loopback"
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def connection_name(host: str, port: int | str) -> str:
    """Returns the same name for one connection, however its peer's address is written."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        host = str(mapped or address)
    return f"{host} {port}"
