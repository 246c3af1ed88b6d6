"""A checkpoint's tokenizer in the grammar process's format, for workers, which have no other use for a
tokenizer."""

from pathlib import Path
from typing import Annotated

import msgspec

from ..core.checkpoint_files import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_CONFIG_BYTES, parse_json, read_bytes
from ..core.gguf_file import is_gguf, read_gguf_header
from ..core.gguf_tokenizer import gguf_tokenizer_json

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]  # as the tokenizers library holds it


class _Named(msgspec.Struct, kw_only=True):
    """An added token, whose id stands outside in tokenizer_config.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Added(_Named, kw_only=True):
    id: _Id


class _Config(msgspec.Struct):
    added_tokens_decoder: dict[_Id, _Named] = {}


class _Tokenizer(msgspec.Struct, omit_defaults=True):
    """The parts of a tokenizer.json; only its added tokens are looked at here."""

    model: msgspec.Raw
    added_tokens: list[_Added] = []
    version: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    normalizer: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    pre_tokenizer: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    post_processor: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    decoder: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def tokenizer_json(path: Path) -> str:
    """tokenizer.json of the checkpoint in `path`, with those added tokens that only tokenizer_config.json
    lists; that of a GGUF file is made from its metadata.

    Raises CheckpointError. Neither truncation nor padding, which are for training, comes along.
    """
    if is_gguf(path):
        return gguf_tokenizer_json(read_gguf_header(path).metadata, str(path))
    file, config_file = path / "tokenizer.json", path / "tokenizer_config.json"
    tokenizer = parse_json(read_bytes(file, MAX_TOKENIZER_BYTES), _Tokenizer, file)
    config = _Config()
    if config_file.exists():
        config = parse_json(read_bytes(config_file, MAX_TOKENIZER_CONFIG_BYTES), _Config, config_file)
    outside = config.added_tokens_decoder.items()
    named = {token_id: _Added(id=token_id, **msgspec.structs.asdict(token)) for token_id, token in outside}
    added = named | {token.id: token for token in tokenizer.added_tokens}
    tokenizer.added_tokens = [added[token_id] for token_id in sorted(added)]
    return msgspec.json.encode(tokenizer).decode()
