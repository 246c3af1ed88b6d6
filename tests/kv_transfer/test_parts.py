"""Which heads travel between which ranks: every receiver's heads come once, from a rank that holds them."""

import pytest
from hypothesis import given, strategies as st

from pdserve.engine.parallel.shard import Shard
from pdserve.kv_transfer.parts import Part, Share, parts

RANKS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("num_kv_heads", "num_senders", "num_receivers", "expected"),
    [
        (8, 1, 1, [Part(0, 0, range(8))]),
        (8, 2, 2, [Part(0, 0, range(4)), Part(1, 1, range(4, 8))]),
        (8, 1, 2, [Part(0, 0, range(4)), Part(0, 1, range(4, 8))]),
        (8, 4, 2, [Part(rank, rank // 2, range(2 * rank, 2 * rank + 2)) for rank in range(4)]),
        (2, 1, 4, [Part(0, rank, range(rank // 2, rank // 2 + 1)) for rank in range(4)]),
        (2, 4, 1, [Part(0, 0, range(1)), Part(2, 0, range(1, 2))]),  # one holder of each head sends it
        (1, 2, 4, [Part(rank // 2, rank, range(1)) for rank in range(4)]),  # both holders send
        (2, 4, 4, [Part(rank, rank, range(rank // 2, rank // 2 + 1)) for rank in range(4)]),
        (6, 2, 1, [Part(0, 0, range(3)), Part(1, 0, range(3, 6))]),
    ],
)
def test_parts(num_kv_heads: int, num_senders: int, num_receivers: int, expected: list[Part]) -> None:
    assert list(parts(num_kv_heads, num_senders, num_receivers)) == expected


@given(
    num_kv_heads=st.sampled_from([1, 2, 4, 8, 16, 24]),
    num_senders=st.sampled_from(RANKS),
    num_receivers=st.sampled_from(RANKS),
)
def test_every_head_reaches_each_of_its_receivers_once(
    num_kv_heads: int, num_senders: int, num_receivers: int
) -> None:
    moved = parts(num_kv_heads, num_senders, num_receivers)
    for rank in range(num_receivers):
        share = Share(rank, num_receivers, num_kv_heads)
        received = share.received(num_senders)
        assert share.heads == Shard(rank, num_receivers).kv_heads(num_kv_heads), "the engine's rule"
        assert sorted(head for part in received for head in part.heads) == list(share.heads)
        assert len({part.sender for part in received}) == len(received)
    for part in moved:
        assert set(part.heads) <= set(Share(part.sender, num_senders, num_kv_heads).heads)
    assert (moved[0].sender, moved[0].receiver) == (0, 0)


@given(
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    num_senders=st.sampled_from(RANKS),
    num_receivers=st.sampled_from(RANKS),
)
def test_ranks_that_hold_the_same_heads_share_the_work(
    num_kv_heads: int, num_senders: int, num_receivers: int
) -> None:
    shares = [Share(rank, num_senders, num_kv_heads) for rank in range(num_senders)]
    for heads in {share.heads for share in shares}:
        num_sent = [len(share.sent(num_receivers)) for share in shares if share.heads == heads]
        assert max(num_sent) - min(num_sent) <= 1


@pytest.mark.parametrize(
    ("rank", "num_ranks", "num_kv_heads", "error"),
    [
        (0, 3, 8, "num_ranks: 3 is not valid, expected a divisor or a multiple of 8 KV heads"),
        (0, 4, 6, "num_ranks: 4 is not valid, expected a divisor or a multiple of 6 KV heads"),
        (2, 2, 8, "rank: 2 is not valid, expected 0 to 1"),
    ],
)
def test_ranks_that_cannot_share_the_heads_are_refused(
    rank: int, num_ranks: int, num_kv_heads: int, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        Share(rank, num_ranks, num_kv_heads)
