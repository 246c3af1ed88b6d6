"""What a command shows to a server, and by what it knows the server: options before the command, or the environment."""

import os
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..core.errors import PdserveError

TLS_CA, TLS_CERT, TLS_KEY = "PDSERVE_TLS_CA", "PDSERVE_TLS_CERT", "PDSERVE_TLS_KEY"
PUBLIC = "public"  # in place of a file: the authorities that gRPC comes with


class BadTrust(PdserveError):
    """A certificate or key of the client cannot be used."""


@dataclass(frozen=True)
class Trust:
    """`tls_ca`: the authorities that the server's certificate must come from, as a file or `public`."""

    tls_ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    @property
    def is_tls(self) -> bool:
        return self.tls_ca is not None or self.certificate is not None

    def channel(self, address: str, options: Sequence[tuple[str, object]]) -> grpc.Channel:
        """Raises BadTrust."""
        if not self.is_tls:
            return grpc.insecure_channel(address, options=options)
        if (self.certificate is None) != (self.key is None):
            raise BadTrust("--cert and --key: got one without the other, expected both or neither")
        credentials = grpc.ssl_channel_credentials(
            root_certificates=None if self.tls_ca in (None, PUBLIC) else _read("--tls-ca", self.tls_ca),
            private_key=_read("--key", self.key),
            certificate_chain=_read("--cert", self.certificate),
        )
        return grpc.secure_channel(address, credentials, options=options)


_told: ContextVar[Trust | None] = ContextVar("trust", default=None)


def use(trust: Trust) -> None:
    """From now on, in place of what the environment says."""
    _told.set(trust)


def current_trust() -> Trust:
    """What the running command was told, or the environment says where no command runs."""
    return _told.get() or Trust(os.environ.get(TLS_CA), os.environ.get(TLS_CERT), os.environ.get(TLS_KEY))


def _read(option: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadTrust(f"{option}: {path!r} cannot be read: {error.strerror}") from error
