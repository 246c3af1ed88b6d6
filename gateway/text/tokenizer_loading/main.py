"""The loading process: `main DIRECTORY LIMITS` writes one `Outcome` and ends, or is killed by a limit or the
tokenizer.

Besides loading it exercises the tokenizer and compiles its chat templates, as the server will do in its own
process."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ....core import limited_process
from ....core.checkpoint_files import MAX_NAME_CHARS, shown, shown_text
from ....core.errors import CheckpointError, InvalidRequest
from ....core.gguf_file import is_gguf, read_gguf_header
from ....core.gguf_tokenizer import chat_templates, gguf_tokenizer_json, special_tokens
from ....core.limited_process import limit_memory
from ..tokenizer import Tokenizer
from .growth import Parts, check_growth, check_vocabulary
from .messages import Limits, LoadFailure, Outcome, TemplateData, TokenizerData

MAX_OUTCOME_BYTES = 128 << 20
MAX_REASON_CHARS = 400
MAX_TEMPLATES = 16
NUM_PROBED_LETTERS = 4096
PROBED_LENGTH = 64  # enough to notice an expression that backtracks


def main() -> None:
    limited_process.set_up()
    limits = msgspec.json.decode(sys.argv[2], type=Limits)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # killed first when memory is short
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output printed by libraries is not an outcome
    data = msgspec.json.encode(_outcome(Path(sys.argv[1]), limits))
    if len(data) > MAX_OUTCOME_BYTES:
        data = msgspec.json.encode(
            LoadFailure(f"it takes {len(data)} bytes, expected at most {MAX_OUTCOME_BYTES}")
        )
    with os.fdopen(output, "wb") as stream:
        stream.write(data)


def _outcome(path: Path, limits: Limits) -> Outcome:
    try:
        return _load(path, limits)
    except MemoryError:
        os.abort()  # as Rust does when it finds none
    except (
        BaseException
    ) as error:  # transformers raises all kinds; tokenizers also a panic, which is not an Exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return LoadFailure(
            "".join(
                shown_text(char) if not char.isprintable() else char for char in reason[:MAX_REASON_CHARS]
            )
        )


def _load(path: Path, limits: Limits) -> TokenizerData:
    if is_gguf(path):
        limit_memory(limits.memory_bytes)
        signal.setitimer(signal.ITIMER_PROF, limits.load_s)
        data = _from_gguf(path)
    else:
        data = _from_directory(path, limits)
    check(data, limits)
    return data


def _from_gguf(path: Path) -> TokenizerData:
    metadata = read_gguf_header(path).metadata
    return TokenizerData(
        backend_json=gguf_tokenizer_json(metadata, str(path)),
        encode_special_tokens=False,
        templates=TemplateData(chat_templates(metadata), special_tokens(metadata, str(path))),
    )


def _from_directory(path: Path, limits: Limits) -> TokenizerData:
    # tokenizers need none, and its import takes seconds
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoTokenizer

    limit_memory(limits.memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, limits.load_s)
    pretrained = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not getattr(pretrained, "is_fast", False):
        kind = type(pretrained).__name__
        raise CheckpointError(f"{kind} is not supported, expected a tokenizer.json of the tokenizers library")
    return exported(pretrained)


def exported(pretrained: Any) -> TokenizerData:
    """Returns `pretrained`, a transformers tokenizer that is backed by the tokenizers library, as values."""
    backend = pretrained.backend_tokenizer
    backend.no_truncation()  # these settings in tokenizer.json are for training
    backend.no_padding()
    templates = pretrained.chat_template or {}
    return TokenizerData(
        backend_json=backend.to_str(),
        encode_special_tokens=bool(backend.encode_special_tokens),
        templates=TemplateData(
            sources={"default": templates} if isinstance(templates, str) else dict(templates),
            special_tokens={
                name: str(token)
                for name, token in pretrained.special_tokens_map.items()
                if isinstance(token, str)
            },
        ),
    )


def check(data: TokenizerData, limits: Limits) -> None:
    """Raises CheckpointError, or dies, if the server could not bear the behaviour of `data`."""
    parts = msgspec.json.decode(data.backend_json, type=Parts)
    check_growth(parts)
    num_templates = len(data.templates.sources)
    if num_templates > MAX_TEMPLATES:
        raise CheckpointError(f"it has {num_templates} chat templates, expected at most {MAX_TEMPLATES}")
    if any(len(token) > MAX_NAME_CHARS for token in data.templates.special_tokens.values()):
        raise CheckpointError(f"it has a special token of more than {MAX_NAME_CHARS} characters")
    tokenizer = Tokenizer(data)
    tokenizer.templates.compile()
    vocabulary = tokenizer.vocabulary()
    check_vocabulary(vocabulary, len(tokenizer.added_tokens))
    for text in _probes(parts.patterns(), vocabulary):
        signal.setitimer(signal.ITIMER_PROF, limits.probe_s)
        try:
            token_ids = tokenizer.encode(text)
        except InvalidRequest:
            raise CheckpointError(f"it fails over the text {shown(text)}") from None
        except Exception:  # a text with letters that it does not know is refused, one request at a time
            continue
        tokenizer.decode(token_ids)
    signal.setitimer(signal.ITIMER_PROF, limits.load_s)
    known = list(vocabulary.values())
    tokenizer.decode(known[:: max(1, len(known) // NUM_PROBED_LETTERS)])


def _probes(patterns: Iterable[str], vocabulary: Iterable[str]) -> Iterator[str]:
    """Returns texts that reveal slowness: an empty one, the known letters, and the searched ones repeated
    many times."""
    yield from ("", " ", "\0", "a" * PROBED_LENGTH, " " * PROBED_LENGTH)
    letters = sorted(_first(NUM_PROBED_LETTERS, (char for token in vocabulary for char in token)))
    yield from ("".join(letters[i : i + PROBED_LENGTH]) for i in range(0, len(letters), PROBED_LENGTH))
    for pattern in dict.fromkeys(patterns):
        yield pattern[:PROBED_LENGTH] * 2
        for char in sorted(_first(PROBED_LENGTH, iter(pattern))):
            yield char * PROBED_LENGTH + "\0"


def _first(count: int, chars: Iterator[str]) -> set[str]:
    found: set[str] = set()
    for char in chars:
        found.add(char)
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    main()
