"""Starts the loading process for a checkpoint, and turns every outcome except a tokenizer into an error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from ....core.checkpoint_files import (
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_CONFIG_BYTES,
    check_size,
    open_regular,
    size_of,
)
from ....core.errors import CheckpointError
from .messages import DEFAULT_LIMITS, Limits, LoadFailure, Outcome, TokenizerData

MAX_TEMPLATE_BYTES = 1 << 20
_FILES = {  # all files that transformers may read, with the most bytes of each
    "config.json": MAX_CONFIG_BYTES,
    "tokenizer_config.json": MAX_TOKENIZER_CONFIG_BYTES,
    "special_tokens_map.json": MAX_CONFIG_BYTES,
    "added_tokens.json": MAX_CONFIG_BYTES,
    "tokenizer.json": MAX_TOKENIZER_BYTES,
    "vocab.json": MAX_TOKENIZER_BYTES,
    "vocab.txt": MAX_TOKENIZER_BYTES,
    "merges.txt": MAX_TOKENIZER_BYTES,
    "tokenizer.model": MAX_TOKENIZER_BYTES,
    "spiece.model": MAX_TOKENIZER_BYTES,
    "sentencepiece.bpe.model": MAX_TOKENIZER_BYTES,
    "tekken.json": MAX_TOKENIZER_BYTES,
    "chat_template.json": MAX_TEMPLATE_BYTES,
    "chat_template.jinja": MAX_TEMPLATE_BYTES,
}
_TEMPLATES = "additional_chat_templates"  # a directory of more of them
_TOO_LONG = (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU)
_TOO_LARGE = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL)  # SIGKILL: out of memory
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def load(path: Path, limits: Limits = DEFAULT_LIMITS) -> TokenizerData:
    """Returns the tokenizer of the checkpoint in `path`. Raises CheckpointError. Takes a second or more, on a
    thread."""
    check_files(path)
    command = [
        sys.executable,
        "-P",
        "-m",
        f"{__package__}.main",
        str(path),
        msgspec.json.encode(limits).decode(),
    ]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the checkpoint may control the output there
            env=os.environ | _ENVIRONMENT,
            timeout=2 * limits.wall_s,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed(path, "it takes too much time") from None
    except OSError as error:
        raise _failed(path, f"its process cannot be started: {error.strerror}") from error
    if -ended.returncode in _TOO_LONG:
        raise _failed(path, "it takes too much time")
    if -ended.returncode in _TOO_LARGE:
        raise _failed(path, "it takes too much memory")
    try:
        outcome: Outcome = msgspec.json.decode(ended.stdout, type=Outcome)
    except msgspec.MsgspecError:
        raise _failed(path, f"its process ended with code {ended.returncode}") from None
    if isinstance(outcome, LoadFailure):
        raise _failed(path, outcome.reason)
    return outcome


def check_files(path: Path) -> None:
    """Raises CheckpointError for a file that is not regular, or too large, before any of it is read."""
    templates = sorted((path / _TEMPLATES).glob("*")) if (path / _TEMPLATES).is_dir() else []
    files = {path / name: max_bytes for name, max_bytes in _FILES.items()} | dict.fromkeys(
        templates, MAX_TEMPLATE_BYTES
    )
    for file, max_bytes in files.items():
        if file.exists():
            with open_regular(file) as stream:
                check_size(file, size_of(stream), max_bytes)


def _failed(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: its tokenizer cannot be loaded: {reason}")
