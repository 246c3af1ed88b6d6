"""Block identity: a chained hash over (parent, tokens, salt), equal in the router and on every worker."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def block_hashes(
    token_ids: Sequence[int], block_size: int, salt: str = "", parent: bytes | None = None
) -> list[bytes]:
    """The hash of each full block of `token_ids`, first to last; a partial tail has none.

    `parent` is the hash of the block before the first one, so that a chain can be continued without its
    start."""
    previous = parent if parent is not None else blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        previous = blake2b(previous + tokens, digest_size=DIGEST_BYTES).digest()
        hashes.append(previous)
    return hashes
