"""The data that a prefill worker sends to a decode worker on COMMIT, besides the KV: the first token of each
choice."""

import msgspec

from .messages import TokenOutput


class HandOff(msgspec.Struct, frozen=True):
    """`first_tokens` are those that the prefill worker reported to the router. Choices that ended with theirs
    are not continued."""

    first_tokens: tuple[TokenOutput, ...]

    @property
    def going_on(self) -> tuple[tuple[int, int], ...]:
        """(choice, token_id) of every choice that is to be decoded."""
        return tuple(
            (token.choice, token.token_id) for token in self.first_tokens if token.finish_reason is None
        )

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(payload: bytes) -> "HandOff":
        """Raises msgspec.MsgspecError when `payload` is not a hand-off."""
        try:
            return msgspec.msgpack.decode(payload, type=HandOff)
        except UnicodeDecodeError as error:  # which msgspec does not count among its own
            raise msgspec.DecodeError(str(error)) from error
