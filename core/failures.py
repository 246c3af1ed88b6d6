"""Kinds of failures of a worker's leg. Code branches on the kind, people read the message beside it."""

import enum


class FailureKind(enum.Enum):
    """The cause of a failed leg or of a failed transfer between two legs."""

    LOST = "lost"  # the peer, the link or a lease is gone: an environment failure
    CANCELLED = "cancelled"  # by the party that requested it
    CORRUPT = "corrupt"  # bytes did not arrive as they were sent
    STORE = "store"  # a worker's blocks could not be read or written
    HELPER = "helper"  # a process that the worker needs beside it is gone
    INVALID = "invalid"  # the request is to blame: no other worker would do better
    DISAGREEMENT = "disagreement"  # the two workers contradict each other: a mistake of ours
