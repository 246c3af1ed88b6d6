"""The grammar process: requests on its standard input, answers on its standard output, until the input ends.

A job that takes too much CPU time, memory or stack ends the process; its parent blames the oldest unanswered
request, and starts another process."""

import os
import sys
import threading
import time

import msgspec
from llguidance import LLTokenizer

from ..core import limited_process
from ..core.codec import FrameDecoder, FrameEncoder
from ..core.limited_process import address_space, cpu_limit, limit_memory, write_all
from .matchers import S_PER_TOKEN, Matchers
from .messages import JOB_S, GrammarSetup, OpenOutput, ToProcess

SETUP_BYTES = 4 << 30  # address space for the vocabulary, which is the checkpoint's
MEMORY_BYTES = 2 << 30  # address space beside what the process has when it is ready
CACHE_BYTES = 512 << 20  # when it has grown by so much, what is kept of earlier grammars goes
STACK_BYTES = 64 << 20  # mostly untouched; nested rules recurse
READ_BYTES = 1 << 16


def main() -> None:
    limited_process.set_up(niceness=int(sys.argv[1]))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=limited_process.serve_or_die, args=(_serve,))
    thread.start()
    thread.join()


def _serve() -> None:
    decoder: FrameDecoder[GrammarSetup | ToProcess] = FrameDecoder(GrammarSetup | ToProcess)
    encoder = FrameEncoder()
    matchers: Matchers | None = None
    first_bytes = 0
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        for message in decoder.feed(data):
            if isinstance(message, GrammarSetup):
                matchers, first_bytes = _set_up(message), address_space()
                continue
            assert matchers is not None, "Setup comes first"
            started_s = time.process_time()
            with cpu_limit(_limit_s(message)):
                answer = matchers.handle(message)
            if isinstance(message, OpenOutput) and address_space() > first_bytes + CACHE_BYTES:
                matchers.forget_compiled()
            if answer is not None:
                answer = msgspec.structs.replace(answer, cost_s=time.process_time() - started_s)
                write_all(sys.stdout.fileno(), encoder.encode(answer))


def _set_up(setup: GrammarSetup) -> Matchers:
    limit_memory(SETUP_BYTES)
    tokenizer = LLTokenizer(setup.tokenizer, n_vocab=setup.vocab_size, eos_token=list(setup.eos_token_ids))
    limit_memory(MEMORY_BYTES)
    return Matchers(tokenizer)


def _limit_s(message: ToProcess) -> float:
    """The CPU time limit of a job. An output that is resumed half-way may have used the time that its tokens
    granted."""
    return JOB_S + S_PER_TOKEN * len(message.token_ids) if isinstance(message, OpenOutput) else JOB_S


if __name__ == "__main__":
    main()
