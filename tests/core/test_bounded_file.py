"""A file that is named to a command costs no more time or memory than a file of the largest size."""

import os
import threading
from pathlib import Path

import pytest

from pdserve.core.bounded_file import read_bounded


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_bounded(file, 100) == b"x" * 100
    with pytest.raises(OSError, match="more than 99 bytes"):
        read_bounded(file, 99)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "/dev/random"])
def test_devices_and_folders_are_refused(path: str) -> None:
    with pytest.raises(OSError, match="neither a regular file nor a pipe"):
        read_bounded(Path(path), 100)


def test_a_pipe_that_nobody_writes_to_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_bounded(tmp_path / "pipe", 100) == b""


@pytest.mark.parametrize("num_bytes", [100, 200])
def test_a_pipe_is_read_until_its_writer_closes_it_or_its_bound(num_bytes: int) -> None:
    """As a shell's `<(COMMAND)` is named."""
    reads, writes = os.pipe()

    def write() -> None:
        for _ in range(num_bytes):
            os.write(writes, b"x")
        os.close(writes)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        if num_bytes == 100:
            assert read_bounded(Path(f"/dev/fd/{reads}"), 100) == b"x" * 100
        else:
            with pytest.raises(OSError, match="more than 100 bytes"):
                read_bounded(Path(f"/dev/fd/{reads}"), 100)
    finally:
        writer.join()
        os.close(reads)
