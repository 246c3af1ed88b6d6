"""The id of this user's last request, which `pdserve explain --last` asks about."""

import uuid
from contextlib import suppress

from ..core import admin_socket
from .client import CommandFailed

NAME = "last-request"


def new() -> str:
    """Returns the id for a request, and remembers it."""
    request_id = uuid.uuid4().hex
    with suppress(admin_socket.UnsafeFolder, OSError):
        admin_socket.prepare()
        (admin_socket.runtime_folder() / NAME).write_text(request_id)
    return request_id


def read() -> str:
    """Raises CommandFailed where there was none."""
    try:
        return (admin_socket.runtime_folder() / NAME).read_text()
    except OSError:
        raise CommandFailed("--last: `pdserve generate` has sent no request yet") from None
