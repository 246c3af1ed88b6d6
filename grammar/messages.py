"""The messages to and from the grammar process, one frame each (`core.codec`). Keys are the caller's.

Setup(tokenizer)           ---->   once, before all others
Open(key, grammar, tokens) ---->
                           <---- Mask(key, 2, bits), or Refused(key, why)
Advance(key, 3, token)     ---->
                           <---- Mask(key, 3, bits), or Refused(key, why)
Close(key)                 ---->
"""

import msgspec

JOB_S = 0.5  # processor time of a job; a process that takes longer over one ends


class GrammarSetup(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The vocabulary that masks are about. There is no answer."""

    tokenizer: str  # as in a checkpoint's tokenizer.json, all added tokens included
    vocab_size: int  # the model's, which may be more
    eos_token_ids: tuple[int, ...]


class OpenOutput(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compile `grammar`, consume the output so far, and return the mask of the next token.

    With `probe` nothing is kept: the mask after one more token is computed too, as some grammars show what
    they cost, or that they are too complex, only then."""

    key: int
    grammar: str
    token_ids: tuple[int, ...] = ()
    probe: bool = False


class Advance(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One more token of the output, the one at `num_tokens - 1`; return the mask of the next."""

    key: int
    num_tokens: int
    token_id: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget all of a key. There is no answer."""

    key: int


class Mask(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The tokens allowed after the first `num_tokens` of the output: bit i, counted from the lowest of the
    first byte, is set where token i may. Tokens that end the output are among them where the grammar is
    complete."""

    key: int
    num_tokens: int
    bits: bytes
    cost_s: float = 0.0  # processor time of the job


class GrammarRefused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A grammar that is none, or one that cannot be afforded; the key is forgotten."""

    key: int
    why: str
    cost_s: float = 0.0


ToProcess = OpenOutput | Advance | Close
FromProcess = Mask | GrammarRefused
