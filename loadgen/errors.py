"""The errors in a user's description of a load, and the failures of a request."""

from ..core.errors import PdserveError


class LoadError(PdserveError):
    """A load cannot be made as it was described, or a target cannot be used at all."""


class LoadRequestFailed(PdserveError):
    """One request of a load failed. `kind` is what failures are counted by: short, without the request's own
    values."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind
        self.message = message
