"""The key file: read again when it changes, with rules for while it is invalid or missing.

A changed file takes effect once it has been stable for a moment: until then it may be half written, and lack
keys or their limits. An invalid file (a syntax error, permissions that are too wide) leaves the previous keys
in force. A file that is missing or unreadable for longer than a moment revokes all keys."""

import logging
import os
import stat
from pathlib import Path

from ...core.errors import ConfigError
from .keys import ApiKey, parse_keys
from .secret_files import Stamp, expected_rights, file_stamp

log = logging.getLogger(__name__)

SETTLE_S = 0.2
MISSING_GRACE_S = 2.0  # editors move a file away before its new version is in place
MAX_FILE_BYTES = 4 << 20


class Unreadable(ConfigError):
    """The file is missing, or may not be opened."""


class KeyFile:
    """Holds the keys that the last `look` found."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        self._path = Path(path).expanduser()
        self._stamp = file_stamp(self._path)
        self._seen = self._stamp  # at the last look, and since when
        self._seen_s = 0.0
        self._missing_since_s: float | None = None
        self.keys = _read(self._path)

    def look(self, now_s: float) -> bool:
        """Reads the file again if it has changed; returns whether the keys in force may have changed. Costs
        one stat otherwise."""
        stamp = file_stamp(self._path)
        if stamp is not None and stamp == self._stamp:
            self._missing_since_s = None
            return False
        if stamp is not None and not self._rests(stamp, now_s):
            self._missing_since_s = None
            return False
        try:
            keys = _read(self._path)
        except Unreadable as error:
            return self._miss(error, now_s)
        except ConfigError as error:
            self._stamp, self._missing_since_s = stamp, None  # so that each problem is logged once
            log.error("%s; going on with the %d keys before", error, len(self.keys))
            return False
        if file_stamp(self._path) != stamp:  # the file changed while it was read
            return False
        self._stamp, self._missing_since_s = stamp, None
        self.keys = keys
        log.info("listen.api_keys: loaded %d keys", len(keys))
        return True

    def _rests(self, stamp: Stamp, now_s: float) -> bool:
        if stamp != self._seen:
            self._seen, self._seen_s = stamp, now_s
        return now_s - self._seen_s >= SETTLE_S

    def _miss(self, error: Unreadable, now_s: float) -> bool:
        if self._missing_since_s is None:
            self._missing_since_s = now_s
            log.error("%s; all keys are revoked in %g s, unless it returns", error, MISSING_GRACE_S)
        if not self.keys or now_s - self._missing_since_s < MISSING_GRACE_S:
            return False
        log.error("%s; all %d keys are revoked until it can be read", error, len(self.keys))
        self.keys, self._stamp = (), None
        return True


def _read(path: Path) -> tuple[ApiKey, ...]:
    """Raises ConfigError, or its subclass Unreadable."""
    where = f"listen.api_keys: got {str(path)!r}, expected"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):  # a missing file becomes a directory when it is mounted
                raise Unreadable(f"{where} a file, not a directory")
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{where} a regular file")
            rights = expected_rights(status, os.geteuid())
            if rights is not None:
                raise ConfigError(f"{where} {rights}")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
        text = data.decode()
    except OSError as error:
        raise Unreadable(f"{where} a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} a text in UTF-8") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{where} at most {MAX_FILE_BYTES} bytes")
    return parse_keys(text, str(path))
