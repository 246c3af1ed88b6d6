"""The entry point of the `pdserve` command: an interrupt while its modules are imported ends it without a
traceback, and output that nobody reads any more without an error."""

import os
import signal
import sys

from .ending import end_at_once

EXIT_SIGPIPE = 128 + signal.SIGPIPE  # as of a program that the signal ends


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # connections that end are no news
    from .main import app

    try:
        app()
    except SystemExit:
        if not _flushed():
            os._exit(EXIT_SIGPIPE)
        raise


def _flushed() -> bool:
    """Whether the reader of the output is still there; the interpreter would complain at its own flush."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True
