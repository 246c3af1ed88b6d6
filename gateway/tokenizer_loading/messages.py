"""What the loading process writes to its output: one of these, as JSON, and then it ends."""

import msgspec

WALL_S = 180.0  # the process has for all, by the clock: it might wait for a file without any work


class TokenizerData(msgspec.Struct, frozen=True, tag="loaded"):
    """A tokenizer as values: all that serving needs of it."""

    backend_json: str  # of the tokenizers library, as in tokenizer.json
    encode_special_tokens: bool  # names of special tokens in a text are text
    chat_templates: dict[str, str]  # by name; the only one of a checkpoint is "default"
    special_tokens: dict[str, str]  # by role: bos_token, eos_token and others


class LoadFailure(msgspec.Struct, frozen=True, tag="failed"):
    """Why there is no tokenizer."""

    reason: str


Outcome = TokenizerData | LoadFailure
