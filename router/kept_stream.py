"""The part of a request's stream that waits for its client: nobody is connected to read it.

Tokens with nothing beside them are kept as numbers: a take-over may bring many streams."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.messages import TokenOutput
from ..core.request import TransferId
from .events import EmitTokens, RouterCommand, StreamCommand


@dataclass(slots=True)
class KeptTokens:
    """Consecutive tokens of one choice for a client that is not connected, without anything beside them."""

    transfer: TransferId
    choice: int
    first_index: int
    token_ids: "array[int]"

    def emitted(self) -> EmitTokens:
        tokens = tuple(
            TokenOutput(self.transfer, self.choice, index, token_id)
            for index, token_id in enumerate(self.token_ids, self.first_index)
        )
        return EmitTokens(self.transfer.request_id, self.choice, tokens)


class KeptStream:
    """Everything that a request has produced for its absent client, in order."""

    __slots__ = ("_parts", "_request_id")

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._parts: list[StreamCommand | KeptTokens] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def keep(self, commands: list[RouterCommand]) -> list[RouterCommand]:
        """Keeps what is for the client; returns the rest."""
        self._parts += [command for command in commands if isinstance(command, StreamCommand)]
        return [command for command in commands if not isinstance(command, StreamCommand)]

    def add_tokens(self, transfer: TransferId, choice: int, first_index: int, tokens: Sequence[int]) -> None:
        """Keeps a choice's next tokens, those that have nothing beside them."""
        if not tokens:
            return
        last = self._parts[-1] if self._parts else None
        if isinstance(last, KeptTokens) and last.choice == choice and last.transfer == transfer:
            last.token_ids.extend(tokens)
        else:
            self._parts.append(KeptTokens(transfer, choice, first_index, array("I", tokens)))

    def add_outputs(self, choice: int, outputs: tuple[TokenOutput, ...]) -> None:
        """Keeps a choice's next tokens, if there are any."""
        if not outputs:
            return
        if all(output.is_plain for output in outputs):
            self.add_tokens(
                outputs[0].transfer, choice, outputs[0].index, [output.token_id for output in outputs]
            )
        else:
            self._parts.append(EmitTokens(self._request_id, choice, outputs))

    def take(self) -> list[RouterCommand]:
        """Returns all of it, in order, and keeps nothing."""
        kept: list[RouterCommand] = [
            one.emitted() if isinstance(one, KeptTokens) else one for one in self._parts
        ]
        self._parts.clear()
        return kept
