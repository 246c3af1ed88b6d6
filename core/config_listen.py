"""The `listen:` part of cluster.yaml: the clients' endpoints, authentication and protection."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from .config_types import (
    AbsolutePath,
    ConfigSection,
    HostName,
    HostPort,
    Origin,
    expected,
    is_loopback,
    parse_host_port,
)


class TlsSection(ConfigSection):
    """TLS of what clients connect to; off without a certificate. Files that change are read again, without a
    restart."""

    certificate: AbsolutePath | None = None
    """The server's certificate and its intermediate ones (PEM)."""
    key: AbsolutePath | None = None
    """The certificate's private key (PEM, without a passphrase)."""
    client_ca: AbsolutePath | None = None
    """Certificates of the authorities that clients' certificates must come from (PEM); without it clients
    need none."""

    @model_validator(mode="after")
    def _whole(self) -> "TlsSection":
        if (self.certificate is None) != (self.key is None):
            raise expected("certificate and key together", got="one without the other")
        if self.client_ca is not None and self.certificate is None:
            raise expected("certificate and key beside client_ca", got="client_ca alone")
        return self

    @property
    def is_on(self) -> bool:
        return self.certificate is not None


class ListenSection(ConfigSection):
    """The clients' endpoints, and their authentication. Other hosts reach only endpoints protected by TLS."""

    tls: TlsSection = TlsSection()
    api_keys: AbsolutePath | None = None
    """The file of the keys that clients must have, a line a key, as `pdserve key new` makes them; without it
    they need none."""
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False)] = ()
    """Names that `Host` may have in HTTP requests to a server without keys on loopback, beside addresses and
    localhost. Others are refused, so that a web page cannot reach it by a name of its own that points to this
    machine."""
    cors_origins: Annotated[tuple[Origin, ...], Field(strict=False)] = ()
    """Origins whose web pages may use the HTTP server from a browser (CORS), such as https://app.example.com;
    '*': those of all pages. Without any, browsers keep pages of other origins from it."""
    admin_without_key: bool = False
    """Answer the `Cluster` service over TCP without keys: any client that reaches the port can see, change
    and stop the cluster, on loopback every local user. By default only the user who started it can, over
    their own Unix socket."""
    allow_insecure: bool = False
    """Listen to other hosts without TLS, or without authenticating clients: for a network that itself keeps
    unauthorized peers out."""
    grpc: HostPort = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server, or a port on loopback; port 0 takes a free one. Addresses other than
    loopback need `tls`, and `api_keys` or `tls.client_ca`; or `allow_insecure`."""
    http: HostPort | None = "127.0.0.1:8000"
    """HOST:PORT of the OpenAI-compatible HTTP server, protected in the same way; null: there is none."""

    @model_validator(mode="after")
    def _one_way_to_administer(self) -> "ListenSection":
        if self.admin_without_key and self.api_keys is not None:
            raise expected(
                "api_keys or admin_without_key: with keys, those marked admin administer", got="both"
            )
        return self

    @field_validator("grpc", "http")
    @classmethod
    def _protected(cls, value: str | None, info: Any) -> str | None:
        host, _ = parse_host_port(value) or ("127.0.0.1", 0)
        # missing when they are wrong themselves
        tls, api_keys = info.data.get("tls"), info.data.get("api_keys", "")
        if is_loopback(host) or info.data.get("allow_insecure", True) or tls is None:
            return value
        if not tls.is_on:
            raise expected(
                "a loopback address such as 127.0.0.1:50051, or listen.tls, or listen.allow_insecure: true"
            )
        if api_keys is None and tls.client_ca is None:
            raise expected(
                "listen.api_keys or listen.tls.client_ca, to know clients by, or listen.allow_insecure: true"
            )
        return value

    @property
    def grpc_host_port(self) -> tuple[str, int]:
        return _host_port(self.grpc)

    @property
    def http_host_port(self) -> tuple[str, int] | None:
        return None if self.http is None else _host_port(self.http)


def _host_port(address: str) -> tuple[str, int]:
    host_port = parse_host_port(address)
    assert host_port is not None, address
    return host_port
