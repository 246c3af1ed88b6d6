"""Checks the Ray cluster that RAY_ADDRESS names, before Ray connects to it.

Ray's calls carry pickles, so a server at that address can run code in this process, and any client of the
cluster can run code in all of its processes. A token authenticates a client to the cluster, but not the
cluster to its clients."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from ray._common.tls_utils import load_certs_from_env

from .errors import LaunchError
from .ray_folder import ACCEPT, RESTART

log = logging.getLogger(__name__)

VARIABLE = "RAY_ADDRESS"
LISTENING = "0A"  # a socket's state in /proc/net/tcp
MAX_PORT = 65535
ANSWER_TIMEOUT_S = 10.0
CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # the first call of every client; its request may be empty


@dataclass(frozen=True)
class RayAddress:
    """The address of a Ray cluster's control store."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> "RayAddress":
        """Parses HOST:PORT; raises LaunchError for anything else. Ray would look for `auto` among the
        processes of all users."""
        host, _, port = text.strip().rpartition(":")
        name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        is_host = (
            bool(name)
            and name.isprintable()
            and not set(name) & set(" /[]@")
            and (":" not in name or name != host)
        )
        if not (is_host and port.isascii() and port.isdigit() and 0 < int(port[:6]) <= MAX_PORT):
            raise LaunchError(f"{VARIABLE}: got {text[:256]!r}, expected HOST:PORT, as `ray start` prints it")
        return RayAddress(name, int(port))


def check_listener(address: RayAddress) -> None:
    """Raises LaunchError unless this user or root listens on the port, if the address is one of this host's.

    Listeners on any of the host's addresses count: Ray itself replaces 127.0.0.1 by another of them."""
    if not _is_of_this_host(address):
        return
    uids = set(_listeners(address.port))
    if not uids:
        raise LaunchError(
            f"no Ray cluster answers at {VARIABLE}={address}: nothing listens on port {address.port} of this"
            " host"
        )
    others = sorted(uids - {os.getuid(), 0})
    if others:
        raise LaunchError(
            f"{VARIABLE}={address}: a process of the user with id {others[0]} listens on port {address.port},"
            f" expected one of this user ({os.getuid()}) or root. It could run code as this user; has the Ray"
            " that was there ended?"
        )


def check_token(address: str, accept: bool) -> None:
    """Raises LaunchError unless the cluster refuses a call without a token; with `accept` it only warns."""
    with _channel(address) as channel:
        try:
            channel.unary_unary(CALL, None, None)(b"", timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
            raise LaunchError(f"no Ray cluster answers at {address}: {error.code().name}") from error
    message = (
        f"the Ray cluster at {address} has no token: whoever reaches its ports, from this host or another,"
        f" joins it and runs code as this user. Restart Ray with a token: {RESTART}. Where nobody else"
        f" reaches the hosts, set {ACCEPT}=1 for `pdserve up`"
    )
    if not accept:
        raise LaunchError(message)
    log.warning("%s (it is set)", message)


def listening_uids(table: str, port: int) -> Iterator[int]:
    """Yields the uids of the sockets that listen on `port`, from a table in the format of /proc/net/tcp."""
    for line in table.splitlines()[1:]:
        _, local, _, state, _, _, _, uid, *_ = line.split()
        if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
            yield int(uid)


def _listeners(port: int) -> Iterator[int]:
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # a kernel without IPv6
            yield from listening_uids(Path("/proc/net", table).read_text(), port)


def _is_of_this_host(address: RayAddress) -> bool:
    """Whether any of the addresses to which the host's name resolves can be bound here."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(f"{VARIABLE}: the host of {address} has no known address ({error})") from error
    return any(_can_bind(family, str(place[0])) for family, _, _, _, place in found)


def _can_bind(family: int, host: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _channel(address: str) -> grpc.Channel:
    """Returns a channel to the address itself that sends no token."""
    options = (("grpc.enable_http_proxy", 0),)
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    try:
        certificate, key, authority = load_certs_from_env()
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"RAY_USE_TLS is set, and Ray's certificates cannot be read: {error}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)
