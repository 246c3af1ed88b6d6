"""Errors of a cluster's start."""

from ..core.errors import PdserveError


class LaunchError(PdserveError):
    """The cluster could not be started."""


class SharedRayFolder(LaunchError):
    """Other local users can change Ray's folder on a node."""
