"""The grammar process: requests on its standard input, answers on its standard output, until the input ends.

A job that takes too much processor time, memory or stack ends the process; who started it blames the oldest request that has
no answer, and starts another one.
"""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

from llguidance import LLTokenizer

from ..core.codec import FrameDecoder, FrameEncoder
from .matchers import Matchers
from .messages import Setup, ToProcess

JOB_S = 0.5  # processor time; what real schemas take is a tenth of it
MEMORY_BYTES = 2 << 30  # address space beside what the process has when it is ready
STACK_BYTES = 64 << 20  # of which mostly nothing is touched; nested rules recurse
NICENESS = 5  # a worker's own computing goes first
READ_BYTES = 1 << 16


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is the end of the input
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    decoder: FrameDecoder[Setup | ToProcess] = FrameDecoder(Setup | ToProcess)
    encoder = FrameEncoder()
    matchers: Matchers | None = None
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        for message in decoder.feed(data):
            if isinstance(message, Setup):
                matchers = _set_up(message)
                continue
            assert matchers is not None, "Setup comes first"
            signal.setitimer(signal.ITIMER_PROF, JOB_S)  # SIGPROF, which nobody handles, ends the process
            answer = matchers.handle(message)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if answer is not None:
                _write(encoder.encode(answer))


def _set_up(setup: Setup) -> Matchers:
    tokenizer = LLTokenizer(setup.tokenizer, n_vocab=setup.vocab_size, eos_token=list(setup.eos_token_ids))
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY_BYTES,) * 2)
    return Matchers(tokenizer)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


if __name__ == "__main__":
    main()
