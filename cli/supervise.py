"""`pdserve supervise`: starts a head's Ray and `pdserve up`, and again after a crash or a reboot of its host.

`ray up` runs it on the head. It ends for good with `pdserve down`, which leaves Ray to `ray down`, and with
`ray stop`, and so with `ray down`: they end all processes with `ray::` in their name, and it gives itself
such a name."""

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..core import admin_socket
from ..core.config import ClusterConfig
from ..core.errors import PdserveError
from ..proto import pdserve_pb2 as pb
from ..telemetry import log_file
from . import local_hosts
from .admin import apply
from .at_reboot import AtReboot
from .client import Client, CommandFailed, connect_to_administer
from .plan import read_config

FOLDER = Path("~/.pdserve")
SERVING = "PDSERVE_SERVING"  # in the environment of `pdserve up`: the descriptor of its lock
LOG = Path("~/pdserve.log")
TEMP_DIR, AUTOSCALING_CONFIG = "--temp-dir=", "--autoscaling-config="  # options of `ray start`
MAX_PAUSE_S = 60.0
MAX_OPEN_FILES = 65536
END_S = 3.0  # part of the 5 s that `ray stop` leaves a process
RAY_PROCESSES = {"gcs_server", "raylet"}
OWN_NAME = b"ray::supervise"  # at most 15 bytes
HIDDEN_NAME = b"pdserve"  # while it runs `ray stop` itself
PR_SET_NAME = 15
ADOPTED = "`pdserve supervise` was killed, and what it started serves on: it is supervised again"
ADOPT_S = 1.0  # between two looks at a `pdserve up` that an earlier supervisor has started
REQUESTS_TO_END = {signal.SIGTERM, signal.SIGINT}


def report_end() -> None:
    """Called by a `pdserve up` that ends as it was asked to: its supervisor may be another one than its
    parent, which learns no exit status."""
    if descriptor := os.environ.get(SERVING):
        os.write(int(descriptor), b"ended\n")


class Pauses:
    """The pauses before the next try, doubling after each short one."""

    def __init__(self) -> None:
        self._next_s = 1.0

    def after(self, lived_s: float) -> float:
        """The pause in seconds after a try that ran for `lived_s`."""
        pause_s = 1.0 if lived_s > MAX_PAUSE_S else self._next_s
        self._next_s = min(2 * pause_s, MAX_PAUSE_S)
        return pause_s


class _Ended(Exception):
    """The supervisor was asked to end. `by`: the process that asked."""

    def __init__(self, by: int) -> None:
        self.by = by


def supervise(file: Path, ray_start: list[str], at_reboot: bool) -> None:
    """Starts Ray, and `pdserve up` in the background; where they are supervised already, applies `file` to
    the cluster.

    `at_reboot`: Ray too is started in the background, and tried again: the network may come up later. Raises
    CommandFailed."""
    folder = FOLDER.expanduser()
    folder.mkdir(0o700, exist_ok=True)
    supervisor = _Supervisor(file.absolute(), ray_start, folder)
    try:
        is_new = _begin(supervisor, file, ray_start, at_reboot)
    except PdserveError:
        supervisor.put_back_file()
        raise
    if not is_new:
        return
    log = LOG.expanduser()
    is_adopted = supervisor.serving is None
    if os.fork():
        print(f"pdserve starts in the background: see `pdserve status`, and {log}", flush=True)
        os._exit(0)
    os.setsid()
    _log_to(log, is_new=not is_adopted)
    supervisor.run()
    os._exit(0)


def _begin(supervisor: "_Supervisor", file: Path, ray_start: list[str], at_reboot: bool) -> bool:
    """Whether this process is the supervisor from here on, rather than one that was there before. Raises
    PdserveError."""
    if (
        not at_reboot
        and subprocess.run([sys.argv[0], "validate", str(file)], stdin=subprocess.DEVNULL).returncode
    ):
        raise CommandFailed(f"{file} is refused; nothing has changed")
    config = read_config(file)
    is_first = _lock("supervisor") is not None  # until the supervisor ends
    supervisor.serving = _lock("serving") if is_first else None
    if supervisor.serving is None:
        _apply(config, file)
        _follow_hosts(file, ray_start)
        if is_first:
            print(ADOPTED, flush=True)
            _allow_open_files()
            supervisor.start_at_reboot()
        return is_first
    _allow_open_files()
    if not at_reboot:
        supervisor.take_file()
        supervisor.start_ray()
        supervisor.start_at_reboot()
    return True


def _lock(name: str) -> int | None:
    """Held until the descriptor that it returns is closed in this process and in those that have inherited
    it; None when another process holds it."""
    descriptor = os.open(FOLDER.expanduser() / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _apply(config: ClusterConfig, file: Path) -> None:
    address = f"127.0.0.1:{config.listen.grpc_host_port[1]}"
    if admin_socket.find(address) is None:
        print("the head is supervised already, and does not serve yet; it takes the file when it tries again")
        return
    print("the head serves already; what changes:")
    with connect_to_administer(address) as client:
        apply(client, file, dry_run=False, wait=False)
        _await_drained_hosts(client)


def _await_drained_hosts(client: Client) -> None:
    """Waits until nothing runs on leaving hosts, for at most `drain_timeout_s`: their Ray is ended next."""
    said: set[str] = set()
    for status in client.cluster.WatchStatus(pb.WatchStatusRequest()):
        leaving = [host for host in status.hosts if host.state == pb.HOST_STATE_LEAVING and host.worker_ids]
        if not leaving:
            return
        for host in leaving:
            if host.address not in said:
                said.add(host.address)
                print(f"{host.address}: {', '.join(host.worker_ids)} drain", flush=True)


def _follow_hosts(file: Path, ray_start: list[str]) -> None:
    copy = _option(ray_start, AUTOSCALING_CONFIG)
    if copy is not None:
        local_hosts.follow(file, Path(copy))


def _option(ray_start: list[str], name: str) -> str | None:
    return next((word.removeprefix(name) for word in ray_start if word.startswith(name)), None)


class _Supervisor:
    def __init__(self, file: Path, ray_start: list[str], folder: Path) -> None:
        self.serving: int | None = None  # a lock that `pdserve up` inherits; None while an older one has it
        self._file = file
        self._ray_start = ray_start
        self._folder = folder
        self._ray_folder = Path(_option(ray_start, TEMP_DIR) or "/tmp/ray")
        self._at_reboot = AtReboot(folder / "at_reboot")
        # the file as it was when it was last found good
        self._copy = Path(_option(ray_start, AUTOSCALING_CONFIG) or file)

    def take_file(self) -> None:
        """Ray and `pdserve up` read a copy: a `ray up` with a file that is refused leaves what a crash starts
        again."""
        if self._copy != self._file:
            local_hosts.write_copy(self._file, self._copy)

    def put_back_file(self) -> None:
        """Restores the file after a refusal: `ray up` does not resend a file that it has sent successfully
        before."""
        if self._copy != self._file and self._copy.exists():
            local_hosts.write_copy(self._copy, self._file)

    def start_at_reboot(self) -> None:
        """Has cron start it again, or says that nothing will."""
        if not AtReboot.is_possible():
            print("this host has no cron: after a reboot of it, run `ray up` again", file=sys.stderr)
            return
        command = [sys.argv[0], "supervise", "--at-reboot", str(self._file), "--", *self._ray_start]
        try:
            self._at_reboot.install(command, os.environ)
        except subprocess.CalledProcessError as error:
            why = (error.stderr or "").strip() or f"it exits with status {error.returncode}"
            print(f"crontab fails ({why}): after a reboot of this host, run `ray up` again", file=sys.stderr)

    def start_ray(self) -> None:
        """Starts Ray in place of a dead one, whose logs stay until the next start. Raises CommandFailed."""
        subprocess.run(["ray", "stop"], stdin=subprocess.DEVNULL)
        before = self._folder / "ray-before"
        shutil.rmtree(before, ignore_errors=True)
        with suppress(FileNotFoundError):
            self._ray_folder.rename(before)
        if subprocess.run(self._ray_start, stdin=subprocess.DEVNULL).returncode:
            raise CommandFailed(f"Ray does not start: `{' '.join(self._ray_start)}`")

    def run(self) -> None:
        """Runs until it is asked to end."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {*REQUESTS_TO_END, signal.SIGCHLD})
        _call_itself(OWN_NAME)
        pauses = Pauses()
        try:
            began_s = time.monotonic()
            while not self._serve():
                sweep()
                _pause(pauses.after(time.monotonic() - began_s))
                began_s = time.monotonic()
        except _Ended as ended:
            is_ray_stop = _is_ray_stop(ended.by)
            if is_ray_stop:
                log_file.remove_ended()  # LOG has the lines
            sweep()
            if not is_ray_stop:
                return  # the host shuts down, perhaps: with it, the supervisor starts again
            local_hosts.end_ray(self._copy)
        if AtReboot.is_possible():
            with suppress(subprocess.CalledProcessError):  # then nothing was installed either
                self._at_reboot.remove()

    def _serve(self) -> bool:
        """Returns at the end of `pdserve up`: whether it was asked to end."""
        if self.serving is None:
            return self._has_adopted_ended()
        os.ftruncate(self.serving, 0)
        if not _names_of_processes() >= RAY_PROCESSES and not self._has_restarted_ray():
            return False
        address = (self._ray_folder / "ray_current_cluster").read_text().strip()
        command = [sys.argv[0], "up", str(self._copy)]
        environment = {"RAY_ADDRESS": address, SERVING: str(self.serving)}
        child = subprocess.Popen(
            command, env=os.environ | environment, preexec_fn=_unblock, pass_fds=(self.serving,)
        )
        try:
            while child.poll() is None:
                _await_signal({*REQUESTS_TO_END, signal.SIGCHLD})
        except _Ended:
            child.terminate()
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise
        return child.returncode == 0

    def _has_adopted_ended(self) -> bool:
        """Returns when the `pdserve up` of an earlier supervisor has ended: whether it was asked to."""
        while (serving := _lock("serving")) is None:
            _pause(ADOPT_S)
        self.serving = serving
        return os.fstat(serving).st_size > 0

    def _has_restarted_ray(self) -> bool:
        _call_itself(HIDDEN_NAME)
        try:
            self.start_ray()
        except CommandFailed as error:
            print(f"pdserve: {error}", flush=True)
            return False
        finally:
            _call_itself(OWN_NAME)
        return True


def _await_signal(signals: Collection[int]) -> None:
    """Raises _Ended at a request to end."""
    info = signal.sigwaitinfo(signals)
    if info.si_signo != signal.SIGCHLD:
        raise _Ended(info.si_pid)


def _pause(pause_s: float) -> None:
    """Raises _Ended at a request to end."""
    info = signal.sigtimedwait(REQUESTS_TO_END, pause_s)
    if info is not None:
        raise _Ended(info.si_pid)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _call_itself(name: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name)


def _is_ray_stop(pid: int) -> bool:
    """Whether the process is `ray stop`, which waits for those that it ends."""
    with suppress(OSError):
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        return b"stop" in words and any(word.rpartition(b"/")[2] == b"ray" for word in words)
    return False


def _names_of_processes() -> set[str]:
    """Returns the names of this user's processes."""
    names = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if process.stat().st_uid == os.getuid():
                names.add((process / "comm").read_text().strip())
    return names


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _log_to(log: Path, is_new: bool) -> None:
    """Sends this process's output to a new log, beside which the last one stays, or to that of a `pdserve up`
    that goes on; its input is empty."""
    with suppress(FileNotFoundError):
        if is_new:
            log.replace(log.with_suffix(".log.1"))
    for descriptor, path in ((0, Path(os.devnull)), (1, log), (2, log)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)


def sweep(parent: Path = Path("/tmp")) -> None:
    """Removes what a launcher left that Ray ended with itself: this user's folders with sockets that nobody
    answers at."""
    for folder in parent.glob("pdserve-*"):
        with suppress(OSError):
            status = os.lstat(folder)
            if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                continue
            sockets = [path for path in folder.iterdir() if stat.S_ISSOCK(os.lstat(path).st_mode)]
            if sockets and all(map(_is_dead, sockets)):
                shutil.rmtree(folder)
    with suppress(OSError):
        for link in admin_socket.runtime_folder().iterdir():
            if not link.exists():
                link.unlink()
        admin_socket.runtime_folder().rmdir()  # unless another cluster has a socket there


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
