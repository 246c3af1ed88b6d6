"""A connection to a running server, and its errors in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import grpc

from ..core import admin_socket
from ..core.config_types import is_loopback, parse_host_port
from ..core.errors import DETAILS_KEY, PdserveError
from ..proto import pdserve_pb2_grpc
from .address import DEFAULT_ADDRESS, answers_http, answers_tls, named_by
from .trust import API_KEY, TLS_CA, current_trust

if TYPE_CHECKING:
    from ..cluster.launch import LaunchedCluster

MAX_REPLY_BYTES = 256 << 20  # whoever answers at the address; four times the largest of a server by default
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 500),  # a router that died is back within seconds
)


class CommandFailed(PdserveError):
    """A command failed; the message is for its user."""


class Client:
    """A client of both services at one address."""

    def __init__(self, address: str, channel: grpc.Channel) -> None:
        self.address = address
        self._channel = channel
        self.generation: pdserve_pb2_grpc.GenerationStub = pdserve_pb2_grpc.GenerationStub(channel)
        self.cluster: pdserve_pb2_grpc.ClusterStub = pdserve_pb2_grpc.ClusterStub(channel)

    def is_answered(self, timeout: float) -> bool:
        """Whether a server accepts connections within the given number of seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            return False
        return True


@contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of the server at `address`, as options and environment say; its errors become
    CommandFailed."""
    with _client(address, current_trust().channel(address, OPTIONS)) as client:
        yield client


@contextmanager
def connect_to_administer(address: str) -> Iterator[Client]:
    """A client for the `Cluster` service of the server at `address`: over the Unix socket of a cluster that
    this user runs there, unless options or environment say what to show; else like `connect`. Raises
    UnsafeFolder."""
    trust = current_trust()
    host, _ = parse_host_port(address) or ("", 0)
    may_be_local = is_loopback(host) and not trust.is_given
    path = admin_socket.find(address) if may_be_local else None
    if path is not None:
        channel, way = grpc.insecure_channel(f"unix:{path}", options=OPTIONS), f"asked over {path}"
    else:
        missing = (
            f"; no cluster of this user has its socket at {admin_socket.socket_link(address)}"
            if may_be_local
            else ""
        )
        shown = f"with the key in {API_KEY}" if trust.api_key else "without a key"
        channel, way = trust.channel(address, OPTIONS), f"asked over TCP {shown}{missing}"
    with _client(address, channel, way) as client:
        yield client


@contextmanager
def connect_locally(cluster: "LaunchedCluster") -> Iterator[Client]:
    """A client of the cluster that this process launched, without the credentials that remote clients must
    present."""
    with _client(
        cluster.grpc_address, grpc.insecure_channel(cluster.local_address, options=OPTIONS)
    ) as client:
        yield client


@contextmanager
def _client(address: str, opened: grpc.Channel, way: str | None = None) -> Iterator[Client]:
    """`way`: how the server was asked to let this user administer."""
    with opened as channel:
        try:
            yield Client(address, channel)
        except grpc.RpcError as error:
            hint = "" if way is None else _way_in(error, way)
            raise CommandFailed(describe(error, address) + hint) from error


def _way_in(error: grpc.RpcError, way: str) -> str:
    if is_unreachable(error):
        return f" ({way})"
    if as_call(error).code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return f" ({way}). Run it as the user who started the cluster, or give an admin key in {API_KEY}"
    return ""


def describe(error: grpc.RpcError, address: str) -> str:
    """Describes a call's error, in one line where the server gave no details."""
    call = as_call(error)
    if is_unreachable(error):
        if current_trust().is_tls:
            return f"no pdserve server answers at {address} with TLS and these certificates: {call.details()}"
        named = f" ({named_by(address)})" if named_by(address) else ""
        if answers_tls(address):
            return f"the server at {address}{named} speaks TLS: name its authority in --tls-ca or {TLS_CA}"
        if answers_http(address):
            return (
                f"an HTTP server answers at {address}{named}, expected the gRPC server's address, which is"
                f" listen.grpc in the cluster's file, by default {DEFAULT_ADDRESS}"
            )
        return (
            f"no pdserve server answers at {address}{named}; start one with `pdserve up`, or name another"
            " with --address"
        )
    if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not _is_from_pdserve(call):
        what = "answer" if "CLIENT:" in (call.details() or "") else "request"
        return f"the {what} is too large: {call.details()}"
    return call.details() or call.code().name.lower().replace("_", " ")


def is_unreachable(error: grpc.RpcError) -> bool:
    """Whether there is no server, or it went away during the call."""
    call = as_call(error)
    return call.code() is grpc.StatusCode.UNAVAILABLE and not _is_from_pdserve(call)


def is_gone(error: grpc.RpcError) -> bool:
    """Whether a call failed because its server ended."""
    return is_unreachable(error) or as_call(error).code() is grpc.StatusCode.CANCELLED


def as_call(error: grpc.RpcError) -> grpc.Call:
    """Casts an error to the call that it is."""
    return cast(grpc.Call, error)


def _is_from_pdserve(error: grpc.Call) -> bool:
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())
