"""The token of a Ray cluster that we start: token mode is on, with a token that only this user can read.

By default, Ray would write its token to ~/.ray with the permissions that the umask leaves, permanently and
for all of a user's clusters. Ours is drawn for one cluster, stored in its run folder, and removed with the
cluster."""

import os
import secrets
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # it is compiled

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


class RayToken:
    """A token, in force in this process and its children until `withdraw`."""

    def __init__(self, run_folder: Path) -> None:
        """Writes the token into `run_folder`. An operator's own token, or choice of another mode, takes
        precedence."""
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
        """Withdraws the token; idempotent."""
        before, self._before = self._before, {}
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if before:
            _refresh()


def _refresh() -> None:
    """Makes Ray reload its settings, which it reads at import, and its token, which it caches."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
