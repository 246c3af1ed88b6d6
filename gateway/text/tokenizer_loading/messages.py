"""The loading process's input, and the output that it writes before it ends: both as JSON."""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """The time and memory that the process may take."""

    wall_s: float = 180.0  # in total, wall-clock: it might wait for a file without any work
    load_s: float = 60.0  # of processor time, to load; 1 s is usual
    probe_s: float = 2.0  # of processor time, per sample text
    memory_bytes: int = 4 << 30  # address space beyond the libraries' use


DEFAULT_LIMITS = Limits()


class TemplateData(msgspec.Struct, frozen=True):
    """A checkpoint's chat templates, and the variables that they find."""

    sources: dict[str, str]  # by name; the only one of a checkpoint is "default"
    special_tokens: dict[str, str]  # by role: bos_token, eos_token and others


class TokenizerData(msgspec.Struct, frozen=True, tag="loaded"):
    """A tokenizer as values: everything that serving needs."""

    backend_json: str  # of the tokenizers library, as in tokenizer.json
    encode_special_tokens: bool  # names of special tokens in a text are plain text
    templates: TemplateData


class LoadFailure(msgspec.Struct, frozen=True, tag="failed"):
    """The reason why there is no tokenizer."""

    reason: str


Outcome = TokenizerData | LoadFailure
