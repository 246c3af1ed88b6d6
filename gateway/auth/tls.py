"""TLS of the servers that clients connect to: certificate, key and client CAs, checked at start and reloaded
when they change.

Files that become invalid leave the previous ones in force: certificate and key may be replaced one after the
other."""

import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ...core.config_listen import TlsSection
from ...core.errors import ConfigError
from .secret_files import Stamp, expected_rights, file_stamp

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The files' contents when they were read; `version` counts the reads."""

    version: int
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class ServerTls:
    """The TLS material of a server. Both servers may share one; thread-safe."""

    def __init__(self, section: TlsSection) -> None:
        """Raises ConfigError for files that cannot be read or do not match."""
        assert section.certificate and section.key
        self._paths = {
            name: Path(path).expanduser()
            for name, path in section.model_dump().items()
            if path is not None and name in ("certificate", "key", "client_ca")
        }
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._loaded = self._load(version=0)

    def current(self) -> Loaded:
        """Returns the files' current contents, or the last valid ones."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp  # also on failure: each problem is logged once
                try:
                    self._loaded = self._load(self._loaded.version + 1)
                    log.info("listen.tls: reloaded changed files")
                except ConfigError as error:
                    log.error("%s; the previous files stay in force", error)
            return self._loaded

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Returns credentials for one gRPC server, which checks for new files before each handshake."""
        first = self.current()
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(first),
            # the stubs omit that None means no change
            self._fetcher(first.version),  # type: ignore[arg-type]
            require_client_authentication=first.client_ca is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Returns a context for one asyncio server, such as uvicorn's, which checks for new files before each
        handshake."""
        return _CurrentContext.of(self)

    def _fetcher(self, version: int) -> Callable[[], "grpc.ServerCertificateConfiguration | None"]:
        def fetch() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal version
            loaded = self.current()
            if loaded.version == version:
                return None
            version = loaded.version
            return _grpc_configuration(loaded)

        return fetch

    def _stamp_now(self) -> tuple[Stamp | None, ...]:
        return tuple(file_stamp(path) for path in self._paths.values())

    def _load(self, version: int) -> Loaded:
        data = {name: _read(name, path) for name, path in self._paths.items()}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._paths["certificate"], self._paths["key"], password=_no_passphrase)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise _wrong(
                "certificate",
                self._paths["certificate"],
                f"a PEM certificate that {_fits(self._paths['key'])}",
            ) from error
        if "client_ca" in data:
            _trust(context, self._paths["client_ca"], data["client_ca"])
        return Loaded(version, data["certificate"], data["key"], data.get("client_ca"), context)


class _CurrentContext(ssl.SSLContext):
    """Switches every new connection to the latest context."""

    _tls: ServerTls

    @staticmethod
    def of(tls: ServerTls) -> "_CurrentContext":
        context = _CurrentContext(ssl.PROTOCOL_TLS_SERVER)
        context._tls = tls
        return context

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._tls.current().context.wrap_bio(*args, **kwargs)


def _grpc_configuration(loaded: Loaded) -> "grpc.ServerCertificateConfiguration":
    pairs = [(loaded.key, loaded.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=loaded.client_ca)


def _trust(context: ssl.SSLContext, path: Path, data: bytes) -> None:
    try:
        context.load_verify_locations(cadata=data.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise _wrong("client_ca", path, "PEM certificates of authorities") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")  # else OpenSSL would prompt for it on the terminal


def _fits(key: Path) -> str:
    return f"belongs to the private key in {str(key)!r}, which has no passphrase"


def _read(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            rights = expected_rights(os.fstat(file.fileno()), os.geteuid()) if name == "key" else None
            data = file.read()
    except OSError as error:
        raise _wrong(name, path, f"a file that can be read ({error.strerror})") from error
    if rights is not None:
        raise _wrong(name, path, rights)
    return data


def _wrong(name: str, path: Path, what: str) -> ConfigError:
    return ConfigError(f"listen.tls.{name}: got {str(path)!r}, expected {what}")
