"""Which links close because nothing needs them."""

import pytest

from pdserve.kv_transfer.idle_links import LinkUse, unused_links

OLD, NEWER, NEWEST = LinkUse(1.0, False), LinkUse(2.0, False), LinkUse(3.0, False)
BUSY = LinkUse(0.0, True)


@pytest.mark.parametrize(
    ("links", "closed"),
    [
        ([], []),
        ([OLD, NEWER], []),
        ([NEWEST, OLD, NEWER], [1]),
        ([BUSY, NEWEST, NEWER], [2]),
        ([BUSY, BUSY, NEWEST, NEWER], [3, 2]),
        ([BUSY, BUSY, BUSY], []),
        ([BUSY, BUSY, BUSY, NEWEST], [3]),
    ],
)
def test_the_least_recently_used_idle_links_beyond_the_bound_close(
    links: list[LinkUse], closed: list[int]
) -> None:
    assert unused_links(dict(enumerate(links)), 2, 10.0, 3.0) == closed


def test_links_that_have_been_idle_for_too_long_close_below_the_bound() -> None:
    links = {"old": OLD, "newer": NEWER, "busy": BUSY}
    assert unused_links(links, 64, 10.0, 11.0) == []
    assert unused_links(links, 64, 10.0, 11.5) == ["old"]
