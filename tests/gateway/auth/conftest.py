"""A key file whose changes take effect at once."""

from pathlib import Path

import pytest

from pdserve.gateway.auth import key_file
from pdserve.gateway.auth.keys import make_key
from tests.gateway.auth.support import ALICE, BOB, write


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to the file take effect at once."""
    monkeypatch.setattr(key_file, "SETTLE_S", 0.0)
    path = tmp_path / "keys"
    write(
        path,
        make_key("alice", ALICE, requests_per_minute=2, tokens_per_minute=600),
        make_key("bob", BOB, is_admin=True),
    )
    return path
