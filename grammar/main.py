"""The grammar process: requests on its standard input, answers on its standard output, until the input ends.

A job that takes too much processor time, memory or stack ends the process; who started it blames the oldest request that has
no answer, and starts another one.
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from llguidance import LLTokenizer

from ..core.codec import FrameDecoder, FrameEncoder
from .matchers import Matchers
from .messages import ToProcess

JOB_S = 1.0  # processor time
MEMORY_BYTES = 2 << 30  # address space beside what the process has when it is ready
STACK_BYTES = 64 << 20  # of which mostly nothing is touched; nested rules recurse
NICENESS = 5  # a worker's own computing goes first
READ_BYTES = 1 << 16


class Options(msgspec.Struct, frozen=True):
    """What the process is started with."""

    model_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def main() -> None:
    """Called with the options as JSON."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is the end of the input
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    matchers = Matchers(load_tokenizer(Path(options.model_path), options.vocab_size, options.eos_token_ids))
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY_BYTES,) * 2)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(matchers,))
    thread.start()
    thread.join()


def load_tokenizer(path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The checkpoint's tokenizer, with those added tokens that only tokenizer_config.json tells of."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    config_path = path / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.exists() else {}
    added: list[dict[str, Any]] = tokenizer.setdefault("added_tokens", [])
    known = {token["id"] for token in added}
    added += [
        {"id": int(token_id), **token}
        for token_id, token in config.get("added_tokens_decoder", {}).items()
        if int(token_id) not in known
    ]
    added.sort(key=lambda token: int(token["id"]))
    return LLTokenizer(json.dumps(tokenizer), n_vocab=vocab_size, eos_token=list(eos_token_ids))


def _serve(matchers: Matchers) -> None:
    decoder: FrameDecoder[ToProcess] = FrameDecoder(ToProcess)
    encoder = FrameEncoder()
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        for message in decoder.feed(data):
            signal.setitimer(signal.ITIMER_PROF, JOB_S)  # SIGPROF, which nobody handles, ends the process
            answer = matchers.handle(message)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if answer is not None:
                _write(encoder.encode(answer))


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


if __name__ == "__main__":
    main()
