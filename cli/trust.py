"""The credentials that a command presents to a server, and those by which it verifies the server: options
before the command, or the environment."""

import os
import ssl
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..core.bounded_file import read_bounded
from ..core.errors import PdserveError

API_KEY = "PDSERVE_API_KEY"  # only there: what stands in options is seen by others
TLS_CA, TLS_CERT, TLS_KEY = "PDSERVE_TLS_CA", "PDSERVE_TLS_CERT", "PDSERVE_TLS_KEY"
MAX_FILE_BYTES = 4 << 20  # all public authorities have a quarter of a MiB
PUBLIC = "public"  # in place of a file: the authorities that gRPC comes with


class BadTrust(PdserveError):
    """A certificate or key of the client cannot be used."""


@dataclass(frozen=True)
class Trust:
    """`tls_ca`: the authorities that the server's certificate must come from, as a file or `public`."""

    tls_ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    api_key: str | None = field(default_factory=lambda: os.environ.get(API_KEY), repr=False)

    @property
    def is_tls(self) -> bool:
        return self.tls_ca is not None or self.certificate is not None

    @property
    def is_given(self) -> bool:
        """Whether there is anything to show to a server, or to know it by."""
        return self.is_tls or self.key is not None or bool(self.api_key)

    def channel(self, address: str, options: Sequence[tuple[str, object]]) -> grpc.Channel:
        """Raises BadTrust."""
        channel = self._channel(address, options)
        return channel if not self.api_key else grpc.intercept_channel(channel, _ShowKey(self.api_key))

    def _channel(self, address: str, options: Sequence[tuple[str, object]]) -> grpc.Channel:
        credentials = self.credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The gRPC credentials; None without TLS. Raises BadTrust."""
        if not self.is_tls:
            return None
        self._check_pair()
        return grpc.ssl_channel_credentials(
            root_certificates=None if self.tls_ca in (None, PUBLIC) else _read("--tls-ca", self.tls_ca),
            private_key=_read("--key", self.key),
            certificate_chain=_read("--cert", self.certificate),
        )

    def tls_context(self) -> ssl.SSLContext:
        """The TLS context for an https address. Raises BadTrust."""
        self._check_pair()
        try:
            context = ssl.create_default_context(
                cafile=None if self.tls_ca in (None, PUBLIC) else _expanded(self.tls_ca)
            )
        except OSError as error:
            raise BadTrust(f"--tls-ca: {self.tls_ca!r} cannot be used: {error.strerror or error}") from error
        if self.certificate is not None:
            try:
                context.load_cert_chain(_expanded(self.certificate), _expanded(self.key))
            except OSError as error:
                raise BadTrust(f"--cert and --key: cannot be used: {error.strerror or error}") from error
        return context

    def _check_pair(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise BadTrust("--cert and --key: got one without the other, expected both or neither")


class _ShowKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds the key to every call."""

    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), self._header])


_given: ContextVar[Trust | None] = ContextVar("trust", default=None)


def use(trust: Trust) -> None:
    """Overrides the environment's settings from now on."""
    _given.set(trust)


def current_trust() -> Trust:
    """The settings of the running command, or those of the environment where no command runs."""
    return _given.get() or Trust(os.environ.get(TLS_CA), os.environ.get(TLS_CERT), os.environ.get(TLS_KEY))


def _expanded(path: str | None) -> Path:
    return Path(path or "").expanduser()


def _read(option: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return read_bounded(Path(path).expanduser(), MAX_FILE_BYTES)
    except OSError as error:
        raise BadTrust(f"{option}: {path!r} cannot be read: {error.strerror}") from error
