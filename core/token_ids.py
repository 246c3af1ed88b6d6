"""Token ids in four bytes each, little-endian as all supported hosts are: where very many are sent or kept,
as a tuple takes 36 bytes for each."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from .hashing import DIGEST_BYTES

ITEM_BYTES = 4


def packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


def check(name: str, token_ids: bytes) -> None:
    """Raises ValueError when the field `name` does not hold whole ids."""
    if len(token_ids) % ITEM_BYTES:
        raise ValueError(f"{name}: {len(token_ids)} bytes, expected {ITEM_BYTES} for each token")


def unpacked(token_ids: bytes) -> "array[int]":
    ids = array("I")
    ids.frombytes(token_ids)
    return ids


def digest(token_ids: Sequence[int]) -> bytes:
    """Returns a hash by which equal sequences are recognised."""
    return blake2b(packed(token_ids), digest_size=DIGEST_BYTES).digest()
