"""Certificates for tests, made by the openssl command, which every machine that runs TLS has."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as files."""

    certificate: Path
    key: Path


class Authority:
    """An authority of its own, in `folder`, and what it has signed."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self.pair = _pair(folder, name)
        _openssl("req", "-x509", *_new_key(self.pair), "-subj", f"/CN={name}", "-days", "2")

    @property
    def certificate(self) -> Path:
        return self.pair.certificate

    def sign(self, name: str, address: str = "127.0.0.1") -> Pair:
        """A certificate for localhost and an address, of a server or a client."""
        pair, request = _pair(self._folder, name), self._folder / f"{name}.csr"
        _openssl("req", "-new", *_new_key(pair, out=request), "-subj", f"/CN={name}")
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName=DNS:localhost,IP:{address}\nbasicConstraints=CA:FALSE\n")
        signing = ("-CA", self.pair.certificate, "-CAkey", self.pair.key, "-CAcreateserial")
        _openssl(
            "x509",
            "-req",
            "-in",
            request,
            *signing,
            "-out",
            pair.certificate,
            "-days",
            "2",
            "-extfile",
            extensions,
        )
        return pair


def _pair(folder: Path, name: str) -> Pair:
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


def _new_key(pair: Pair, out: Path | None = None) -> tuple[str | Path, ...]:
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    return (*kind, "-keyout", pair.key, "-out", out or pair.certificate)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(("openssl", *map(str, arguments)), check=True, capture_output=True)
