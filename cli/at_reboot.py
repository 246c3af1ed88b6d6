"""Makes this user's cron start a command after the host has booted."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

OF_A_SESSION = {"_", "MAIL", "OLDPWD", "PWD", "SHLVL", "TERM", "TMUX"}
NO_CRONTAB = ("no crontab for", "no such file")  # to `crontab -l` an error like any other
PREFIXES_OF_A_SESSION = ("DBUS_", "SSH_", "XDG_")


class AtReboot:
    """One command, in a script that a line of the user's crontab runs."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._line = f"@reboot {shlex.quote(str(script))}"

    @staticmethod
    def is_possible() -> bool:
        """Whether this host has cron."""
        return shutil.which("crontab") is not None

    def install(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Replaces what was installed before. Only this user can read the script: an environment may hold
        secrets."""
        self._script.unlink(missing_ok=True)
        self._script.touch(0o700)
        self._script.write_text(script_of(command, environment))
        self._write([*self._others(), self._line])

    def remove(self) -> None:
        """Idempotent."""
        self._write(self._others())
        self._script.unlink(missing_ok=True)

    def _others(self) -> list[str]:
        """The lines of the crontab that are not ours; none where there is no crontab. Raises
        CalledProcessError where it cannot be read: to replace it would lose its lines."""
        environment = os.environ | {"LC_ALL": "C"}
        listed = subprocess.run(
            ["crontab", "-l"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
        )
        if not any(reason in listed.stderr.lower() for reason in NO_CRONTAB):
            listed.check_returncode()
        return [line for line in listed.stdout.splitlines() if line != self._line]

    @staticmethod
    def _write(lines: list[str]) -> None:
        subprocess.run(["crontab", "-"], input="".join(f"{line}\n" for line in lines), text=True, check=True)


def script_of(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A shell script that runs `command` in `environment`, less what belongs to a login session."""
    exports = (
        f"export {name}={shlex.quote(value)}"
        for name, value in sorted(environment.items())
        if _is_lasting(name)
    )
    return "\n".join(["#!/bin/sh", *exports, f"cd && exec {shlex.join(command)}", ""])


def _is_lasting(name: str) -> bool:
    is_of_a_session = name in OF_A_SESSION or name.startswith(PREFIXES_OF_A_SESSION)
    return name.isidentifier() and not is_of_a_session  # bash exports functions under names that are none
