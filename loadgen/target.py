"""What a load is sent to, whichever door it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .records import CompletedRequest

OnTokens = Callable[[int], None]  # called with their number when tokens have come


@dataclass(frozen=True)
class ModelFacts:
    """What a target tells about its model; None: it does not say."""

    name: str
    vocab_size: int | None = None
    max_model_len: int | None = None
    special_token_ids: tuple[int, ...] = ()  # not for prompts


@dataclass(frozen=True)
class LoadRequest:
    """What one request of a load asks for."""

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
