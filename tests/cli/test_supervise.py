"""`pdserve supervise`, with stubs of `ray`, `pdserve up` and `crontab` that record their calls."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cli.at_reboot import AtReboot, script_of
from pdserve.cli.supervise import Pauses, report_end, sweep

SUPERVISOR = """
import sys
from pathlib import Path
from pdserve.cli import supervise

supervise._names_of_processes = lambda: supervise.RAY_PROCESSES if Path("ray-lives").exists() else set()
supervise.sweep = lambda: None
supervise._pause = lambda pause_s: None
sys.argv = [sys.argv[1]]
ray_start = ["ray", "start", "--temp-dir=ray", "--autoscaling-config=copy"]
supervise.FOLDER = Path('.')
supervisor = supervise._Supervisor(Path("cluster.yaml"), ray_start, Path("."))
supervisor.serving = supervise._lock("serving")
supervisor.take_file()
supervisor.start_at_reboot()
supervisor.run()
"""
STANDINS = {
    "ssh": 'echo "$*" > ended.new; mv ended.new ended; echo > ending',
    "crontab": 'if [ "$1" = -l ]; then cat crontab; else cat > crontab; fi',
    "ray": (
        """
        case "$1" in
            start) echo start >> calls; mkdir ray; echo 10.0.0.2:6379 > ray/ray_current_cluster; touch ray-lives;;
            stop) if [ -z "$2" ]; then echo stop >> calls; else kill "$2"; while kill -0 "$2" 2> /dev/null; do :; done; fi;;
        esac"""
    ),
}
UNTIL_TERMINATED = (
    "trap 'echo terminated >> calls; exit 0' TERM; echo up >> calls; echo > started; while :; do sleep 0.01;"
    " done"
)


@pytest.fixture
def folder(tmp_path: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The supervisor's folder, with the stubs on its PATH."""
    for name, lines in STANDINS.items():
        executable(tmp_path / "bin" / name, lines)
    (tmp_path / "cluster.yaml").write_text("provider: {type: local, worker_ips: [10.0.0.3]}")
    (tmp_path / "crontab").write_text("5 4 * * * backup\n")
    runtime_folder.mkdir()
    (runtime_folder / "up-1.log").touch()  # of a run that has ended
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executable(path: Path, lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def supervisor(up: str) -> "subprocess.Popen[bytes]":
    """Running in the current folder; `up`: what `pdserve up` does, in shell."""
    executable(Path("bin/pdserve"), up)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(Path("bin/pdserve").absolute())], env=environment
    )


@pytest.fixture
def serving(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A supervisor whose `pdserve up` serves."""
    os.mkfifo("started")
    with supervisor(UNTIL_TERMINATED) as process:
        Path("started").read_text()
        yield process
        process.kill()


def calls() -> list[str]:
    return Path("calls").read_text().split("\n")[:-1]


def test_only_a_crash_is_restarted_within_the_running_ray(
    folder: Path,
) -> None:
    with supervisor("echo up $RAY_ADDRESS >> calls; [ $(grep -c up calls) = 2 ]"):
        pass
    assert calls() == ["stop", "start", "up 10.0.0.2:6379", "up 10.0.0.2:6379"]
    assert Path("crontab").read_text() == "5 4 * * * backup\n"


def test_a_dead_ray_is_restarted_and_both_logs_are_kept(folder: Path) -> None:
    with supervisor(
        "echo up >> calls; touch ray/$(grep -c up calls); rm ray-lives; [ $(grep -c up calls) = 2 ]"
    ):
        pass
    assert calls() == ["stop", "start", "up", "stop", "start", "up"]
    assert Path("ray-before", "1").exists() and Path("ray", "2").exists()


def test_its_child_keeps_serving_when_the_supervisor_is_killed(folder: Path) -> None:
    os.mkfifo("started")
    os.mkfifo("end")
    with supervisor("echo > started; cat end") as process:
        Path("started").read_text()
        process.kill()
    with Path("serving").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path("end").write_text("")
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_a_refused_file_is_not_used_for_a_restart(folder: Path) -> None:
    (folder / "cluster.yaml").write_text("good")
    with supervisor(
        "echo up $(cat $2) >> calls; echo bad > cluster.yaml; rm ray-lives; [ $(grep -c up calls) = 2 ]"
    ):
        pass
    assert calls() == ["stop", "start", "up good", "stop", "start", "up good"]


def test_ray_stop_ends_it_for_good(serving: "subprocess.Popen[bytes]") -> None:
    assert Path("/proc", str(serving.pid), "comm").read_text() == "ray::supervise\n"  # so `ray stop` finds it
    ended = subprocess.Popen(["ray", "stop", str(serving.pid)])
    assert serving.wait() == 0
    ended.wait()
    assert calls()[-1] == "terminated"
    assert Path("crontab").read_text() == "5 4 * * * backup\n"
    assert not list(Path("runtime").iterdir())


def test_ray_stop_on_the_head_ends_ray_on_the_other_hosts(serving: "subprocess.Popen[bytes]") -> None:
    os.mkfifo("ending")
    ended = subprocess.Popen(["ray", "stop", str(serving.pid)])
    Path("ending").read_text()
    assert serving.wait() == 0
    ended.wait()
    words = Path("ended").read_text()
    assert "10.0.0.3 bash" in words and "ray stop" in words


def test_a_host_restarts_the_supervisor_at_boot(serving: "subprocess.Popen[bytes]") -> None:
    serving.send_signal(signal.SIGTERM)
    assert serving.wait() == 0
    assert calls()[-1] == "terminated"
    assert "@reboot" in Path("crontab").read_text()
    assert Path("runtime/up-1.log").exists()
    assert (
        "supervise --at-reboot" in Path("at_reboot").read_text()
        and Path("at_reboot").stat().st_mode & 0o777 == 0o700
    )


def supervise(folder: Path) -> str:
    """The output of a second `pdserve supervise`."""
    (folder / "cluster.yaml").write_text("metadata: {pdserve: {}}")
    environment = os.environ | {"HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"PDSERVE_RUNTIME_DIR": str(folder / "run")}
    code = "import sys; sys.argv[0] = 'bin/pdserve'; from pdserve.cli.entry import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "supervise",
        "cluster.yaml",
        "--",
        "ray",
        "start",
        "--temp-dir=ray",
    ]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and "it takes the file when it tries again" in done.stdout
    return done.stdout


def test_where_one_runs_already_another_leaves_ray_as_it_is(folder: Path) -> None:
    executable(folder / "bin" / "pdserve", "exit 0")  # the file is valid
    (folder / ".pdserve").mkdir()
    with (folder / ".pdserve" / "supervisor").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "supervised again" not in supervise(folder)
    assert not Path("calls").exists()


@pytest.mark.parametrize("end", ["crash", "as asked"])
def test_what_a_killed_supervisor_has_started_is_adopted(
    folder: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(folder / "bin" / "pdserve", '[ "$1" = validate ] || echo $1 >> calls')
    for name in (".pdserve", "ray"):
        (folder / name).mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("10.0.0.2:6379")
    with (folder / ".pdserve" / "serving").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "it is supervised again" in supervise(folder)
        assert "@reboot" in Path("crontab").read_text() and not Path("calls").exists()
        if end == "as asked":
            monkeypatch.setenv("PDSERVE_SERVING", str(lock.fileno()))
            report_end()
    with (folder / ".pdserve" / "supervisor").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it has ended
    assert (Path("calls").exists() and "up" in calls()) == (end == "crash")
    assert Path("crontab").read_text() == "5 4 * * * backup\n"


def test_a_refused_file_is_replaced_by_the_last_good_one(folder: Path) -> None:
    executable(folder / "bin" / "pdserve", "echo $1 is wrong; exit 1")
    (folder / "cluster.yaml").write_text("bad")
    (folder / "copy").write_text("good")
    code = "import sys; sys.argv[0] = 'bin/pdserve'; from pdserve.cli.entry import main; main()"
    words = ["supervise", "cluster.yaml", "--", "ray", "start", "--autoscaling-config=copy"]
    environment = os.environ | {"HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "cluster.yaml is refused; nothing has changed" in done.stderr
    assert (folder / "cluster.yaml").read_text() == "good" and not (folder / "calls").exists()


def test_pauses_double_up_to_a_minute_and_reset_after_long_runs() -> None:
    pauses = Pauses()
    assert [pauses.after(lived_s=3.0) for _ in range(8)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert [pauses.after(lived_s=61.0), pauses.after(lived_s=3.0)] == [1.0, 2.0]


def test_only_folders_of_dead_launchers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("PDSERVE_RUNTIME_DIR", str(runtime))
    for folder in ("pdserve-dead", "pdserve-lives", "pdserve-other", "runtime"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pdserve-other" / "notes").touch()
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alive:
        dead.bind(str(tmp_path / "pdserve-dead" / "grpc.sock"))
        dead.close()
        alive.bind(str(tmp_path / "pdserve-lives" / "lines"))
        alive.listen()
        (runtime / "127.0.0.1_1.sock").symlink_to(tmp_path / "pdserve-dead" / "grpc.sock")
        (runtime / "127.0.0.1_2.sock").symlink_to(tmp_path / "pdserve-lives" / "lines")
        sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pdserve-lives", "pdserve-other", "runtime"}
    assert [path.name for path in runtime.iterdir()] == ["127.0.0.1_2.sock"]


def test_a_script_runs_in_the_current_environment_without_session_variables(tmp_path: Path) -> None:
    environment = {
        "RAY_AUTH_MODE": "token",
        "ODD": "it's $HOME",
        "SSH_CONNECTION": "a b",
        "XDG_RUNTIME_DIR": "/run",
        "BASH_FUNC_x%%": "() {",
    }
    executable(tmp_path / "script", script_of(["env", "-0"], environment))
    shown = subprocess.check_output(
        [tmp_path / "script"], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, text=True
    )
    after = dict(line.split("=", 1) for line in shown.split("\0") if line)
    assert (
        after["RAY_AUTH_MODE"] == "token" and after["ODD"] == "it's $HOME" and after["PWD"] == str(tmp_path)
    )
    assert not {"SSH_CONNECTION", "XDG_RUNTIME_DIR", "BASH_FUNC_x%%"} & after.keys()


def test_a_crontab_that_cannot_be_read_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = 'if [ "$1" = -l ]; then echo "cannot read the spool" >&2; exit 1; else cat > crontab; fi'
    Path("bin/crontab").write_text(f"#!/bin/sh\n{stub}\n")
    with pytest.raises(subprocess.CalledProcessError):
        AtReboot(folder / "at_reboot").install(["ray"], {})
    assert Path("crontab").read_text() == "5 4 * * * backup\n"


def test_other_lines_of_a_crontab_stay(folder: Path) -> None:
    at_reboot = AtReboot(folder / "at_reboot")
    for _ in range(2):
        at_reboot.install(["true"], {})
        assert Path("crontab").read_text() == f"5 4 * * * backup\n@reboot {folder / 'at_reboot'}\n"
    for _ in range(2):
        at_reboot.remove()
        assert Path("crontab").read_text() == "5 4 * * * backup\n" and not (folder / "at_reboot").exists()
