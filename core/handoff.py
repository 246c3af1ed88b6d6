"""What a prefill worker tells a decode worker on COMMIT, besides the KV: the first token of each choice that goes on."""

import msgspec


class HandOff(msgspec.Struct, frozen=True):
    """`first_tokens` holds (choice, token_id) of every choice that did not end with its first token; none when all did."""

    first_tokens: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(payload: bytes) -> "HandOff":
        """Raises msgspec.MsgspecError when `payload` is not a hand-off."""
        return msgspec.msgpack.decode(payload, type=HandOff)
