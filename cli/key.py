"""`pdserve key new`: draws a key for a client, and makes the line by which the server knows it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..gateway.auth.keys import make_key, new_key
from .commands import Group, PlainCommand

key_app = typer.Typer(cls=Group, no_args_is_help=True, help="API keys of clients (listen.api_keys).")


@key_app.callback()
def key() -> None:
    """Holds the commands for keys."""


@key_app.command(cls=PlainCommand)
def new(
    name: Annotated[str, typer.Argument(help="The key's name; its requests take turns under it.")],
    file: Annotated[
        Path | None, typer.Option(help="Add the line to this file, and print the key alone.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Let it also see and change the cluster.")] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Let it also read the metrics of the whole cluster.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(help="Share cached prefixes with keys of this group (kv.cache_sharing: group)."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests a minute, at most.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a minute, at most.")
    ] = None,
    min_priority: Annotated[
        int | None, typer.Option(help="The lowest `priority`, served first, that its requests may ask for.")
    ] = None,
    weight: Annotated[
        int | None, typer.Option(help="Under load it gets this many times the tokens of others.")
    ] = None,
) -> None:
    """Generate a key. It is shown once: the server's file has only its hash."""
    from .client import CommandFailed

    drawn = new_key()
    limits = {
        "min_priority": min_priority,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    try:
        line = make_key(name, drawn, admin, metrics, group, **limits).line
    except ValueError as error:
        raise CommandFailed(f"{name!r}: {error}") from error
    print(drawn)
    if file is None:
        print("the server's file (listen.api_keys) needs this line:", file=sys.stderr)
        print(line)
    else:
        _append(file, line)


def _append(file: Path, line: str) -> None:
    """A file that is not there yet is made for its owner alone."""
    from .client import CommandFailed

    try:
        with os.fdopen(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+") as opened:
            text = opened.read()
            opened.write(b"\n" * (not text.endswith(b"\n") and bool(text)) + line.encode() + b"\n")
    except OSError as error:
        raise CommandFailed(f"{file}: cannot be written: {error.strerror}") from error
