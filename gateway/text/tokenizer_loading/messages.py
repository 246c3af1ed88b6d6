"""The loading process's input, and what it writes to its output before it ends: both as JSON."""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """The time and memory that the process may take."""

    wall_s: float = 180.0  # for all, by the clock: it might wait for a file without any work
    load_s: float = 60.0  # of processor time, to load; 1 s is usual
    probe_s: float = 2.0  # of processor time, for one text that is tried
    memory_bytes: int = 4 << 30  # address space beside what the libraries take


DEFAULT_LIMITS = Limits()


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
