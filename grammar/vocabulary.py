"""A checkpoint's tokenizer as the grammar process takes it, for workers: they have no use of their own for a tokenizer."""

from pathlib import Path
from typing import Any

import msgspec


def tokenizer_json(path: Path) -> str:
    """tokenizer.json of the checkpoint in `path`, with those added tokens that only tokenizer_config.json tells of."""
    tokenizer: dict[str, Any] = msgspec.json.decode((path / "tokenizer.json").read_bytes())
    config_path = path / "tokenizer_config.json"
    config: dict[str, Any] = msgspec.json.decode(config_path.read_bytes()) if config_path.exists() else {}
    known: dict[int, Any] = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    named = {
        int(token_id): {"id": int(token_id), **token} for token_id, token in config.get("added_tokens_decoder", {}).items()
    }
    added = named | known
    return msgspec.json.encode(tokenizer | {"added_tokens": [added[token_id] for token_id in sorted(added)]}).decode()
