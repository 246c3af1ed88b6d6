"""The server of the gateway's tests, for a load."""

from tests.gateway.conftest import cluster, local_address, server

__all__ = ["cluster", "local_address", "server"]
