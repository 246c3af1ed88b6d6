"""Meetings without a network between them."""

from pdserve.kv_transfer.meeting import Meeting


def joined_meetings() -> tuple[Meeting, Meeting]:
    """Returns two joined ends: entries set at one appear at the other."""
    one = Meeting(lambda key, value: other.put(key, value))
    other = Meeting(one.put)
    return one, other
