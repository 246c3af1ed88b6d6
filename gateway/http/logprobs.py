"""Log probabilities in the formats of OpenAI's two APIs."""

from collections.abc import Sequence
from typing import Any

from ...proto import pdserve_pb2 as pb
from ..text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[pb.TokenLogprobs],
    offset: int,
    prompt: tuple[Sequence[int], Sequence[pb.TokenLogprobs]] | None,
) -> tuple[dict[str, Any], int]:
    """Formats the tokens of a completion, whose text begins at `offset`, after those of a `prompt`; also
    returns the offset after them.

    The first token of a prompt has no predecessor, and so no log probability."""
    items: list[pb.TokenLogprobs | None] = list(logprobs)
    if prompt is not None:
        token_ids, items = [*prompt[0], *token_ids], [None, *prompt[1], *items]
    pieces = [tokenizer.piece(token_id) for token_id in token_ids]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    formatted = {
        "tokens": pieces,
        "token_logprobs": [None if item is None else max(item.logprob, LEAST) for item in items],
        "top_logprobs": [_top(tokenizer, piece, item) for piece, item in zip(pieces, items, strict=True)],
        "text_offset": offsets,
    }
    return formatted, offset


def _top(tokenizer: Tokenizer, piece: str, item: pb.TokenLogprobs | None) -> dict[str, float] | None:
    if item is None:
        return None
    top = {tokenizer.piece(token.token_id): max(token.logprob, LEAST) for token in item.top}
    return top | {piece: max(item.logprob, LEAST)}


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]
) -> dict[str, Any]:
    """Formats the tokens of a chat completion."""
    return {
        "content": [
            _token(tokenizer, token_id, item.logprob)
            | {"top_logprobs": [_token(tokenizer, top.token_id, top.logprob) for top in item.top]}
            for token_id, item in zip(token_ids, logprobs, strict=True)
        ]
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.piece(token_id),
        "logprob": max(logprob, LEAST),
        "bytes": list(tokenizer.piece_bytes(token_id)),
    }
