"""Tests whether a port on another host can be reached."""

import os
import socket
from collections.abc import Callable

CONNECT_TIMEOUT_S = 3.0


def reach(address: tuple[str, int], talk: Callable[[socket.socket], None] = lambda _: None) -> str:
    """Returns why it cannot be reached, or why `talk` over the connection failed; empty when all went
    well."""
    try:
        with socket.create_connection(address, CONNECT_TIMEOUT_S) as sock:
            talk(sock)
    except TimeoutError:
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""
