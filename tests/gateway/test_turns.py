import itertools

from hypothesis import given, strategies as st

from pdserve.gateway.turns import Turns


@given(st.lists(st.sampled_from("abc")))
def test_each_group_with_items_has_every_other_turn_at_the_latest(groups: list[str]) -> None:
    turns: Turns[tuple[str, int]] = Turns()
    for number, group in enumerate(groups):
        turns.add(group, (group, number))
    taken = []
    while turns:
        taken.append(turns.next())
    assert sorted(number for _, number in taken) == list(range(len(groups)))
    for group in set(groups):
        places = [index for index, (name, _) in enumerate(taken) if name == group]
        assert [taken[place][1] for place in places] == [n for n, name in enumerate(groups) if name == group]
        assert all(later - earlier <= len(set(groups)) for earlier, later in itertools.pairwise(places))
        assert places[0] < len(set(groups))
