"""The address of the server that a command talks to: --address, PDSERVE_ADDRESS, listen.grpc of
./cluster.yaml, or the default."""

import http.client
import os
import socket
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.config_file import ROOT
from ..core.config_types import LOOPBACK, format_host_port, parse_host_port
from ..core.errors import ConfigError
from ..core.yaml_lines import parse_yaml

VARIABLE = "PDSERVE_ADDRESS"
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_FILE = Path("cluster.yaml")
PROBE_TIMEOUT_S = 1.0
_ANY_HOST = {"0.0.0.0": LOOPBACK, "::": "::1"}

_sources: dict[str, str] = {}  # of the addresses that this process looked up, by address


def named_by(address: str) -> str:
    """Returns what named an address, for a message; empty where a command was given none."""
    return _sources.get(address, "")


def _look_up(context: typer.Context, value: str | None) -> str:
    if value is None:
        address, source = _from_file()
    else:
        is_option = str(context.get_parameter_source("address")).endswith("COMMANDLINE")
        address, source = checked(value), "--address" if is_option else VARIABLE
    _sources[address] = source
    return address


def checked(value: str) -> str:
    """Returns an address in one spelling. Raises BadParameter."""
    host_port = parse_host_port(value)
    if host_port is not None:
        return format_host_port(*host_port)
    if value.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"got {value!r}, expected HOST:PORT of the gRPC server (listen.grpc), not a URL"
        )
    hint = f"; {value}:50051?" if parse_host_port(f"{value}:50051") is not None else ""
    raise typer.BadParameter(f"got {value!r}, expected HOST:PORT such as {DEFAULT_ADDRESS}{hint}")


def _from_file() -> tuple[str, str]:
    """Returns the gRPC address that ./cluster.yaml names, or else the default. Mistakes elsewhere in the file
    do not concern a client. Raises BadParameter where another user may have written it: whoever chooses the
    address gets the key and the prompts."""
    if not DEFAULT_FILE.is_file():
        return DEFAULT_ADDRESS, "the default, as there is no ./cluster.yaml"
    with suppress(ConfigError, OSError, UnicodeDecodeError):
        with DEFAULT_FILE.open(encoding="utf-8") as file:
            for name, entry in (("./cluster.yaml", os.fstat(file.fileno())), ("its folder", os.stat("."))):
                if not _is_ours(entry):
                    raise typer.BadParameter(
                        f"{name} can be written by another user than this one and root, so it does not name"
                        f" the server: name it by --address or {VARIABLE}"
                    )
            text = file.read()
        values: Any = parse_yaml(text, str(DEFAULT_FILE)).values
        for key in (*ROOT, "listen", "grpc"):
            values = values.get(key) if isinstance(values, Mapping) else None
        host, port = parse_host_port(values) or ("", 0)
        if port:
            return format_host_port(_ANY_HOST.get(host, host), port), "listen.grpc in ./cluster.yaml"
    return DEFAULT_ADDRESS, "the default, as ./cluster.yaml names no other"


def _is_ours(entry: os.stat_result) -> bool:
    """Whether only this user, their own group and root can write it, or replace what is in it."""
    shared = stat.S_IWOTH | (0 if entry.st_gid in (os.getegid(), 0) else stat.S_IWGRP)
    is_sticky = stat.S_ISDIR(entry.st_mode) and entry.st_mode & stat.S_ISVTX
    return entry.st_uid in (os.geteuid(), 0) and (bool(is_sticky) or not entry.st_mode & shared)


def answers_http(address: str) -> bool:
    """Returns whether an HTTP server listens at `address`, which a gRPC client cannot talk to."""
    host, port = parse_host_port(address) or ("", 0)
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def answers_tls(address: str) -> bool:
    """Returns whether a TLS server listens at `address`, which a client without TLS cannot talk to."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is sent nothing
    try:
        with socket.create_connection(parse_host_port(address) or ("", 0), PROBE_TIMEOUT_S) as connection:
            context.wrap_socket(connection).close()
            return True
    except OSError:
        return False


Address = Annotated[
    str,
    typer.Option(
        envvar=VARIABLE,
        callback=_look_up,
        show_default="listen.grpc of ./cluster.yaml, or 127.0.0.1:50051",
        help="HOST:PORT of the server.",
    ),
]
NO_ADDRESS: Any = None  # looked up by the option's callback
