"""The token of a Ray that we start: Ray's token mode on, with a token that nobody but this user can read.

By itself Ray would write its token to ~/.ray with the rights that the umask leaves, for all of a user's
clusters and for good. Ours is drawn for one cluster, lies in its run folder, and goes with the cluster."""

import os
import secrets
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # it is compiled

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


class RayToken:
    """In force in this process, and in all that it starts, until `withdraw`."""

    def __init__(self, run_folder: Path) -> None:
        """Written into `run_folder`. An operator who has chosen a mode other than token, or has a token,
        keeps that."""
        self._before: dict[str, str | None] = {}
        if os.environ.get(MODE, "token") != "token" or os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH):
            return
        path = run_folder / "ray_token"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self._before = {name: os.environ.get(name) for name in (MODE, TOKEN_PATH)}
        os.environ.update({MODE: "token", TOKEN_PATH: str(path)})
        _refresh()

    def withdraw(self) -> None:
        """Idempotent."""
        before, self._before = self._before, {}
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if before:
            _refresh()


def _refresh() -> None:
    """Ray has read its settings when it was imported, and keeps the token that it has read once."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
