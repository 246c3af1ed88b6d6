"""Bounded places, fairly shared: no client keeps others out by taking many."""

from contextlib import AbstractContextManager, ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.held_bytes import Shares
from pdserve.gateway.places import FairPlaces, NoPlace, address_group


def full(*, max_places: int = 8, max_per_group: int = 6, attacker: int = 6) -> FairPlaces[int]:
    places: FairPlaces[int] = FairPlaces("connections", max_places, max_per_group)
    for holder in range(attacker):
        places.take("attacker", holder)
    return places


def test_a_group_that_takes_many_loses_its_oldest_to_newcomers() -> None:
    places = full(max_places=6)
    assert places.take("alice", 100) == 0
    assert places.take("bob", 101) == 1
    assert len(places) == 6


def test_a_group_at_its_bound_loses_its_own_oldest() -> None:
    places = full()
    assert places.take("attacker", 100) == 0
    assert places.take("alice", 101) is None


def test_a_newcomer_does_not_take_from_a_smaller_group() -> None:
    places = full(max_places=6, attacker=5)
    places.take("alice", 100)
    assert places.take("attacker", 101) == 0
    assert 100 in places


def test_holders_in_use_keep_their_places() -> None:
    places = full(max_places=3, max_per_group=1, attacker=0)
    with ExitStack() as uses:
        for holder, group in enumerate("abc"):
            places.take(group, holder)
        for holder in (0, 2):
            uses.enter_context(places.in_use(holder))
        with places.in_use(1), pytest.raises(NoPlace, match="3 connections are open already"):
            places.take("alice", 100)
        assert places.take("alice", 100) == 1


def test_groups_that_use_all_their_places_do_not_keep_others_out() -> None:
    places: FairPlaces[int] = FairPlaces("connections", 12, 6)
    with ExitStack() as uses:
        for holder in range(12):
            places.take("ab"[holder % 2], holder)
            uses.enter_context(places.in_use(holder))
        for newcomer in range(100, 104):
            evicted = places.take(f"alice{newcomer}", newcomer)
            assert evicted is not None and evicted < 12
            uses.enter_context(places.in_use(newcomer))
        assert all(newcomer in places for newcomer in range(100, 104))


def test_a_holder_that_was_used_is_the_youngest_afterwards() -> None:
    places = full()
    with places.in_use(0):
        pass
    assert places.take("attacker", 100) == 1


def test_uses_of_one_holder_are_counted() -> None:
    places = full(max_places=1, max_per_group=1, attacker=1)
    with places.in_use(0):
        with places.in_use(0):
            pass
        with pytest.raises(NoPlace):
            places.take("alice", 100)


def test_a_use_may_begin_before_its_holder_has_a_place() -> None:
    places = full(max_places=2, max_per_group=1, attacker=0)
    with places.in_use(0):
        places.take("alice", 0)
        with pytest.raises(NoPlace):
            places.take("alice", 1)
    assert places.take("alice", 1) == 0


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.8.7", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8::1:2:3", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
    ],
)
def test_addresses_of_one_client_are_one_group(host: str, group: str) -> None:
    assert address_group(host) == group


class PlacesBesideModel(RuleBasedStateMachine):
    """Compares with a simple, slow model."""

    def __init__(self) -> None:
        super().__init__()
        self.places: FairPlaces[int] = FairPlaces("connections", 7, 4)
        self.model: dict[int, str] = {}
        self.order: list[int] = []  # evictable ones, oldest first
        self.uses: dict[int, list[AbstractContextManager[None]]] = {}
        self.kept: set[int] = set()
        self.shares = Shares(7, 1)
        self.next = 0

    @rule(group=st.sampled_from("abcd"))
    def take(self, group: str) -> None:
        holder, self.next = self.next, self.next + 1
        try:
            evicted = self.places.take(group, holder)
        except NoPlace:
            evictable_groups = {self.model[other] for other in self.order}
            at_bound = list(self.model.values()).count(group) == 4
            assert group not in evictable_groups if at_bound else not evictable_groups
            return
        if evicted is not None:
            counts = {g: sum(self.model[h] == g for h in self.order) for g in self.model.values()}
            victim_group = self.model.pop(evicted)
            assert victim_group == group or counts[victim_group] == max(counts.values())
            assert evicted == min(
                (h for h in self.order if self._was(h, evicted, victim_group)), key=self.order.index
            )
            self.order.remove(evicted)
        self.model[holder] = group
        self.order.append(holder)

    def _was(self, holder: int, evicted: int, victim_group: str) -> bool:
        return holder == evicted or self.model.get(holder) == victim_group

    @precondition(lambda self: self.model)
    @rule(data=st.data(), what=st.sampled_from(("begin", "end", "leave")))
    def change(self, data: st.DataObject, what: str) -> None:
        holder = data.draw(st.sampled_from(sorted(self.model)))
        uses = self.uses.setdefault(holder, [])
        if what == "end" and not uses:
            return
        if what == "leave":
            self.places.leave(holder)
        elif what == "begin":
            uses.append(self.places.in_use(holder))
            uses[-1].__enter__()
        else:
            uses.pop().__exit__(None, None, None)
        if what != "leave" and uses and holder in self.kept:
            return
        if holder in self.kept:
            self.kept.remove(holder)
            self.shares.give_back(self.model[holder], 1)
        else:
            self.order.remove(holder)
        if what == "leave":
            del self.model[holder]
        elif uses and self.shares.take(self.model[holder], 1):
            self.kept.add(holder)
        else:
            self.order.append(holder)

    @invariant()
    def holds_together(self) -> None:
        self.places.check_integrity()
        assert len(self.places) == len(self.model) and all(holder in self.places for holder in self.model)


TestPlaces = PlacesBesideModel.TestCase
