"""A block's hash stands for every token up to its end, and for the salt."""

from hypothesis import given, strategies as st

from pdserve.core.hashing import block_hashes

tokens = st.lists(st.integers(0, 2**32), max_size=70)


@given(tokens, st.integers(1, 20), st.integers(0, 5))
def test_a_chain_can_be_continued_without_its_start(
    token_ids: list[int], block_size: int, num_known: int
) -> None:
    whole = block_hashes(token_ids, block_size)
    known = whole[:num_known]
    if known:
        rest = token_ids[len(known) * block_size :]
        assert known + block_hashes(rest, block_size, parent=known[-1]) == whole
    assert len(whole) == len(token_ids) // block_size


@given(tokens, st.integers(1, 20), st.data())
def test_a_changed_token_changes_its_block_and_all_that_follow(
    token_ids: list[int], size: int, data: st.DataObject
) -> None:
    before = block_hashes(token_ids, size)
    if not before:
        return
    position = data.draw(st.integers(0, len(before) * size - 1))
    changed = [*token_ids[:position], token_ids[position] + 1, *token_ids[position + 1 :]]
    after = block_hashes(changed, size)
    first = position // size
    assert after[:first] == before[:first]
    assert all(mine != theirs for mine, theirs in zip(after[first:], before[first:], strict=True))


def test_salts_keep_prefixes_apart() -> None:
    assert block_hashes(range(32), 16, "alice") != block_hashes(range(32), 16, "bob")
