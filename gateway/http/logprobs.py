"""Log probabilities as OpenAI's two interfaces tell them."""

from collections.abc import Sequence
from typing import Any

from ...proto import pdserve_pb2 as pb
from ..tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs], offset: int
) -> tuple[dict[str, Any], int]:
    """Of the tokens of a completion, whose text begins at `offset`; with the offset of what follows."""
    pieces = [tokenizer.piece(token_id) for token_id in token_ids]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    told = {
        "tokens": pieces,
        "token_logprobs": [max(item.logprob, LEAST) for item in logprobs],
        "top_logprobs": [
            {tokenizer.piece(top.token_id): max(top.logprob, LEAST) for top in item.top} | {piece: max(item.logprob, LEAST)}
            for piece, item in zip(pieces, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }
    return told, offset


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs]) -> dict[str, Any]:
    """Of the tokens of a chat completion."""
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
