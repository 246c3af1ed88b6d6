"""The interface of a load's target, whichever protocol it serves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .records import CompletedRequest

OnTokens = Callable[[int], None]  # called with their number when tokens have come


@dataclass(frozen=True)
class ModelFacts:
    """The facts that a target reports about its model; None: not reported."""

    name: str
    vocab_size: int | None = None
    max_model_len: int | None = None
    special_token_ids: tuple[int, ...] = ()  # not for prompts


@dataclass(frozen=True)
class LoadRequest:
    """The parameters of one request of a load."""

    token_ids: Sequence[int]
    max_tokens: int
    ignore_eos: bool = True
    temperature: float = 0.0


class Target(Protocol):
    """A server, as its client."""

    async def facts(self) -> ModelFacts:
        """Raises RequestFailed when it cannot be asked."""
        ...

    async def send(self, request: LoadRequest, on_tokens: OnTokens) -> CompletedRequest:
        """Send it and read the stream to its end. Raises RequestFailed."""
        ...

    async def close(self) -> None: ...
