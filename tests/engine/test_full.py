"""Full parts of a host, and the thread of a worker that looks for them."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdserve.engine import full as full_module
from pdserve.engine.full import MIN_FREE_BYTES, full_parts
from pdserve.worker import host_monitor
from pdserve.worker.host_monitor import HostMonitor
from tests.deadlines import WAIT_S

GIB = 1 << 30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """The free bytes of file systems of 1 GiB, by folder: each folder has one of its own."""
    free = {"/dev/shm": GIB, "/tmp": GIB, "/home/me": GIB, str(tmp_path): GIB}
    numbers = {folder: number for number, folder in enumerate(free)}
    fake = SimpleNamespace(
        stat=lambda folder: SimpleNamespace(st_dev=numbers[folder]),
        statvfs=lambda folder: SimpleNamespace(f_bavail=free[folder], f_frsize=1, f_blocks=GIB),
        path=SimpleNamespace(expanduser=lambda _: "/home/me"),
    )
    monkeypatch.setattr(full_module, "os", fake)
    monkeypatch.setattr(full_module, "tempfile", SimpleNamespace(gettempdir=lambda: "/tmp"))
    monkeypatch.setattr(full_module, "probe_memory", lambda: (16 * GIB, GIB))
    return free


def test_a_folder_is_full_when_hardly_a_file_fits(free: dict[str, int], tmp_path: Path) -> None:
    assert full_parts(str(tmp_path)) == ()
    free |= {"/dev/shm": MIN_FREE_BYTES - 1, "/tmp": MIN_FREE_BYTES, str(tmp_path): 0}
    assert full_parts(str(tmp_path)) == (("/dev/shm", GIB), (str(tmp_path), GIB))


def test_a_file_system_is_named_once(free: dict[str, int], tmp_path: Path) -> None:
    free["/tmp"] = 0
    assert full_parts("/tmp") == (("/tmp", GIB),)


def test_memory_is_full_before_ray_ends_processes(
    free: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_module, "probe_memory", lambda: (100 * GIB, 6 * GIB))
    assert full_parts(str(tmp_path)) == ()
    monkeypatch.setattr(full_module, "probe_memory", lambda: (100 * GIB, 6 * GIB - 1))
    assert full_parts(str(tmp_path)) == (("its memory", 100 * GIB),)


def test_a_folder_that_does_not_exist_is_not_full(tmp_path: Path) -> None:
    assert str(tmp_path / "none") not in dict(full_parts(str(tmp_path / "none")))


def test_a_monitor_reports_while_the_host_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(), (("/tmp", GIB),), (("/tmp", GIB),), ()]
    asked_all = threading.Event()
    reports: list[tuple[tuple[str, int], ...]] = []

    def answer(ray_folder: str) -> tuple[tuple[str, int], ...]:
        assert ray_folder == os.sep
        if not answers:
            asked_all.set()
            return ()
        return answers.pop(0)

    monkeypatch.setattr(host_monitor, "full_parts", answer)
    monkeypatch.setattr(host_monitor, "INTERVAL_S", 0.0)
    monitor = HostMonitor(Path(os.sep), reports.append)
    monitor.start()
    assert asked_all.wait(WAIT_S)
    monitor.stop()
    monitor._thread.join(WAIT_S)
    assert reports == [(("/tmp", GIB),)] * 2
