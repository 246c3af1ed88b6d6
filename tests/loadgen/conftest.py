"""The server of the gateway's tests, for a load."""

from tests.gateway.conftest import cluster, server

__all__ = ["cluster", "server"]
