"""The prefix index finds the longest cached prefix and its holders, and hashes no more of a prompt than
necessary."""

import gc
import random

from hypothesis import given, strategies as st

from pdserve.core.hashing import block_hashes
from pdserve.router.prefix_index import NUM_SHARDS, PrefixChain, PrefixIndex, block_keys
from pdserve.router.ranking import Ranking

TOKENS = tuple(range(1000))


@given(
    held=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 70)),
    num_tokens=st.integers(1, 600),
    evicted=st.integers(0, 70),
)
def test_prefixes_are_found_to_the_block_and_forgotten_when_evicted(
    held: dict[str, int], num_tokens: int, evicted: int
) -> None:
    index = PrefixIndex()
    for name, num_blocks in held.items():
        index.update(name, block_hashes(TOKENS[: num_blocks * 8], 8, "salt"), ())
    if "a" in held:
        index.update("a", (), block_hashes(TOKENS, 8, "salt")[evicted:])
        held["a"] = min(held["a"], evicted)
    index.remove_worker("d")
    held.pop("d", None)
    chain = PrefixChain(TOKENS[:num_tokens], 8, "salt")
    usable = {name: min(num_blocks, num_tokens // 8) for name, num_blocks in held.items()}
    longest, holders = index.longest(chain)
    assert longest == max(usable.values(), default=0)
    assert set(holders) == {name for name, n in usable.items() if n == longest and longest}
    for name, num_blocks in usable.items():
        assert index.cached_blocks(name, chain, longest) == num_blocks
    assert index.cached_blocks("unknown", chain, longest) == 0


def test_an_index_without_workers_is_empty() -> None:
    index = PrefixIndex()
    index.update("a", block_hashes(TOKENS, 8), ())
    index.update("b", block_hashes(TOKENS, 8), ())
    index.remove_worker("a")
    index.remove_worker("b")
    longest, holders = index.longest(PrefixChain(TOKENS, 8, ""))
    assert (longest, list(holders)) == (0, [])
    for _ in range(2 * NUM_SHARDS):
        index.update("c", (), ())
    assert not any(index._shards) and not index._sets and not index._num_uses
    assert len(index._names) <= 3, "the numbers of removed workers are used again"


def test_a_full_index_gives_the_garbage_collector_nothing_to_visit() -> None:
    index = PrefixIndex()
    hashes = [number.to_bytes(16, "big") for number in range(20_000)]
    num_before = len(gc.get_objects())
    for name in ("a", "b", "c"):
        index.update(name, hashes, hashes[-1:])
    assert len(gc.get_objects()) - num_before < 50
    assert not any(map(gc.is_tracked, (*index._shards, index._sets, index._num_uses)))


def test_a_new_worker_inherits_no_block_of_a_removed_one() -> None:
    index = PrefixIndex()
    hashes, chain = block_hashes(TOKENS, 8), PrefixChain(TOKENS, 8, "")
    for number in range(3 * NUM_SHARDS):
        index.update("old", hashes, ())
        index.remove_worker("old")
        index.update("new", hashes[: number % 5], ())
        longest, holders = index.longest(chain)
        assert (longest, list(holders)) == ((number % 5, ["new"]) if number % 5 else (0, []))
        assert index.cached_blocks("old", chain, 10) == 0
        index.remove_worker("new")


def test_the_index_agrees_with_sets_of_blocks_whatever_happens() -> None:
    rng, index = random.Random(0), PrefixIndex()
    hashes = [rng.randbytes(16) for _ in range(300)]
    held: dict[str, set[bytes]] = {name: set() for name in "abcdef"}
    for step in range(2000):
        name = rng.choice("abcdef")
        added, evicted = (rng.sample(hashes, rng.randrange(8)) for _ in range(2))
        if rng.random() < 0.01:
            index.remove_worker(name)
            held[name] = set()
        else:
            index.update(name, added, evicted)
            held[name] = (held[name] | set(added)) - set(evicted)
        if step % 50 == 0:
            for name, blocks in held.items():
                assert index.blocks_of(name) == set(block_keys(blocks))


def test_no_dictionary_holds_more_than_its_share() -> None:
    rng, index = random.Random(0), PrefixIndex()
    index.update("a", (rng.randbytes(16) for _ in range(100 * NUM_SHARDS)), ())
    assert max(map(len, index._shards)) < 200


def test_an_unknown_prompt_costs_one_hash() -> None:
    chain = PrefixChain(TOKENS, 8, "")
    PrefixIndex().longest(chain)
    assert len(chain._keys) == 1


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 3)), max_size=40))
def test_a_ranking_is_always_sorted_by_key_then_name(changes: list[tuple[str, int | None]]) -> None:
    ranking: Ranking[str] = Ranking()
    expected: dict[str, float] = {}
    for name, key in changes:
        if key is None:
            ranking.discard(name)
            expected.pop(name, None)
        else:
            ranking.put(name, key, name)
            expected[name] = key
    assert ranking.best(10) == sorted(expected, key=lambda name: (expected[name], name))
    assert ranking.best(2) == ranking.best(10)[:2]
    assert len(ranking) == len(expected)
