"""Meetings without a network between them."""

from pdserve.kv_transfer.meeting import Meeting


def joined_meetings() -> tuple[Meeting, Meeting]:
    """What either sets, the other has."""
    one = Meeting(lambda key, value: other.put(key, value))
    other = Meeting(one.put)
    return one, other
