"""Hosts on one machine: network namespaces on a bridge, each with an sshd, a cron, a home, /tmp, /dev/shm,
/run, a host name and a PID namespace of its own. They share the machine's processor, its clock, and its disk
but for those folders.

The namespaces are the state: the network's name suffices to find its hosts. Files that survive a host's
reboot are in `Hosts.folder`, of mode 0700. The first host is the operator's: it alone has the private key
that all of them admit."""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).with_name("boot.py")
NAMESPACES = Path("/run/netns")
NEEDED = {  # a command, and the packages of Debian and of Fedora that have it
    "ip": ("iproute2", "iproute"),
    "bridge": ("iproute2", "iproute"),
    "tc": ("iproute2", "iproute-tc"),
    "unshare": ("util-linux", "util-linux"),
    "/usr/sbin/sshd": ("openssh-server", "openssh-server"),
    "ssh": ("openssh-client", "openssh-clients"),
    "rsync": ("rsync", "rsync"),
    "/usr/sbin/cron": ("cron", "cronie"),
}
NOBODYS_MAC = "02:00:00:00:00:00"  # packets to this address reach nobody
LOGIN = ("HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/bash", "LANG=C.UTF-8")
NEW_NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
BUSY_S = 900.0  # for a host to boot, or a command to end, on a busy machine
CLONE_NEWNET = 0x40000000
MIN_BURST_BYTES = 256 << 10  # a veth passes segments of 64 KiB


class HostsError(Exception):
    """Hosts cannot be created, or an operation on them failed."""


def whats_missing() -> str | None:
    """Why hosts cannot be created here, and the remedy; None where they can."""
    if os.getuid() != 0:
        return "hosts are made of namespaces, which takes root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if not missing:
        return None
    debian, fedora = (" ".join(sorted({NEEDED[name][family] for name in missing})) for family in (0, 1))
    return f"not found: {', '.join(missing)} (apt-get install {debian}; dnf install {fedora})"


class Hosts:
    """The hosts of one network. `name` identifies the network: at most 8 letters or digits."""

    def __init__(self, name: str = "pdserve") -> None:
        if not (name.isalnum() and name.isascii() and len(name) <= 8):
            raise HostsError(f"network: got {name!r}, expected at most 8 ASCII letters or digits")
        self.name = name
        self.folder = Path("/var/tmp", f"pdserve-hosts-{name}")
        self._switch = f"{name}-switch"
        self._booted: dict[str, subprocess.Popen[bytes]] = {}  # by this object, by host

    def up(self, hosts: Sequence[str]) -> None:
        """Makes and boots hosts of these names; the first is the operator's. Their addresses are 10.77.0.1
        and on."""
        if reason := whats_missing():
            raise HostsError(reason)
        if self.names():
            names = ", ".join(self.names())
            raise HostsError(f"network {self.name} has hosts already: {names}; take them away with `down`")
        self.folder.mkdir(mode=0o700)
        try:
            (self.folder / "names").write_text("\n".join(hosts))
            _make_key(self.folder / "key", "operator")
            run("ip", "netns", "add", self._switch)
            run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host in hosts:
                self._lay_cable(host)
                self._furnish(host)
                self.boot(host)
        except BaseException:
            self.down()
            raise

    def names(self) -> list[str]:
        """The operator's host first; empty where there are none."""
        names = self.folder / "names"
        return names.read_text().split("\n") if names.exists() else []

    def address(self, host: str) -> str:
        """The address by which all hosts reach it; its default route uses another one."""
        return f"10.77.0.{self._index(host) + 1}"

    def home(self, host: str) -> Path:
        """The path of the host's home on the machine."""
        return self.folder / host / "home"

    def command(self, host: str, command: str) -> list[str]:
        """The machine's command that runs a shell command on the host."""
        login = ["env", "-i", *LOGIN, "bash", "-lc", f"cd; {command}"]
        return ["nsenter", f"--target={self._first(host)}", "-m", "-u", "-i", "-n", "-p", *login]

    def run(self, host: str, command: str, timeout_s: float = BUSY_S) -> str:
        """Returns the command's output. Raises HostsError, with the whole output, when it fails."""
        done = subprocess.run(
            self.command(host, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise HostsError(f"{host}: `{command}` ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def space(self, host: str) -> str:
        """The name of its network namespace."""
        return f"{self.name}-host{self._index(host)}"

    def enter(self, host: str) -> None:
        """Puts the calling thread, and whatever it starts, into the host's network; it stays in the machine
        otherwise."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (NAMESPACES / self.space(host)).open() as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def pids(self, host: str) -> list[int]:
        """The host's processes, as the machine numbers them."""
        return [pid for pid in _pids(self.space(host)) if _number_inside(pid) is not None]

    def cut(self, one: str, other: str) -> None:
        """Drops all packets between the two, as a firewall would. Survives a reboot."""
        for sender, receiver in ((one, other), (other, one)):
            entry = (self.address(receiver), "lladdr", NOBODYS_MAC, "dev", "eth0", "nud", "permanent")
            run("ip", "-n", self.space(sender), "neigh", "replace", *entry)

    def heal(self, one: str, other: str) -> None:
        """Undoes a cut; idempotent."""
        for sender, receiver in ((one, other), (other, one)):
            entry = (self.address(receiver), "lladdr", self._mac(receiver), "dev", "eth0", "nud", "reachable")
            run("ip", "-n", self.space(sender), "neigh", "replace", *entry)

    def isolate(self, host: str) -> None:
        """The switch forwards nothing from or to the host, which still sees its carrier."""
        run("bridge", "-n", self._switch, "link", "set", "dev", self._port(host), "state", "0")

    def join(self, host: str) -> None:
        """Undoes `isolate`; idempotent."""
        run("bridge", "-n", self._switch, "link", "set", "dev", self._port(host), "state", "3")

    def shape(self, host: str, rate: str = "", delay: str = "", loss: str = "") -> None:
        """Limits the host's link both ways: `100mbit`, `5ms`, `1%`, in tc's units. Without any it is as fast
        as it gets."""
        ends = ((self.space(host), "eth0"), (self._switch, self._port(host)))
        for namespace, device in ends:
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], stderr=subprocess.DEVNULL
            )
            if delay or loss:
                wanted = {"delay": delay, "loss": loss, "rate": rate}
                limits = [word for name, limit in wanted.items() if limit for word in (name, limit)]
                try:
                    run(
                        "tc",
                        "-n",
                        namespace,
                        "qdisc",
                        "add",
                        "dev",
                        device,
                        "root",
                        "netem",
                        "limit",
                        "10000",
                        *limits,
                    )
                except HostsError as error:
                    raise HostsError(f"delay and loss take the kernel's module sch_netem: {error}") from error
            elif rate:
                limits = ["rate", rate, "burst", str(MIN_BURST_BYTES), "latency", "50ms"]
                run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits)

    def freeze(self, host: str) -> None:
        """Stops all of its processes; its kernel goes on acknowledging what arrives."""
        self._signal_all(host, signal.SIGSTOP)

    def thaw(self, host: str) -> None:
        self._signal_all(host, signal.SIGCONT)

    def fill(self, host: str, folder: str) -> None:
        """Writes FOLDER/full until nothing more fits. Only in /dev/shm, /tmp and /run: the disk is all
        hosts'."""
        if folder not in ("/dev/shm", "/tmp", "/run"):
            raise HostsError(f"folder: got {folder!r}, expected /dev/shm, /tmp or /run")
        self.run(host, f"cat /dev/zero > {folder}/full 2> /dev/null || true")

    def halt(self, host: str, hard: bool = False) -> None:
        """Kills all of its processes. `hard`: as by pulling the plug, so that peers see no connection
        close."""
        if hard:
            self.isolate(host)
        _kill_all(self.space(host))
        self._reap(host)

    def boot(self, host: str) -> None:
        """Starts a halted host, with its home and crontabs as they were, and with /tmp, /dev/shm and /run
        empty."""
        folder = self.folder / host
        python = str(Path(sys.base_prefix, "bin", "python3"))
        kept = {str(REPOSITORY), *(os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix))}
        self.join(host)
        with (folder / "boot.log").open("ab") as log:
            first = subprocess.Popen(
                ["ip", "netns", "exec", self.space(host), "unshare", *NEW_NAMESPACES]
                + [python, "-I", str(BOOT), str(folder), host, *sorted(kept)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        assert first.stdout is not None
        self._booted[host] = first
        with first.stdout as ready:
            is_up = bool(select.select([ready], [], [], BUSY_S)[0]) and ready.readline() == b"ready\n"
        if not is_up:
            raise HostsError(f"{host} does not boot: {(folder / 'boot.log').read_text()[-1000:]}")

    def reboot(self, host: str, hard: bool = False) -> None:
        self.halt(host, hard)
        self.boot(host)

    def down(self) -> None:
        """Removes all hosts, with their homes; idempotent."""
        prefix = f"{self.name}-"
        for space in [path.name for path in NAMESPACES.glob(f"{prefix}*")]:
            _kill_all(space)
            run("ip", "netns", "del", space)
        for host in list(self._booted):
            self._reap(host)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def _reap(self, host: str) -> None:
        if host in self._booted:
            self._booted.pop(host).wait()

    def _lay_cable(self, host: str) -> None:
        space, port = self.space(host), self._port(host)
        run("ip", "netns", "add", space)
        run("ip", "-n", space, "link", "set", "lo", "up")
        run(
            "ip",
            "-n",
            space,
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            port,
            "netns",
            self._switch,
        )
        run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        run("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        # the default route leads elsewhere, to nobody
        run("ip", "-n", space, "link", "add", "wan", "type", "bridge")
        run("ip", "-n", space, "addr", "add", f"198.51.100.{self._index(host) + 1}/24", "dev", "wan")
        run("ip", "-n", space, "link", "set", "wan", "up")
        run("ip", "-n", space, "route", "add", "default", "via", "198.51.100.254", "dev", "wan")

    def _furnish(self, host: str) -> None:
        """Creates the disk contents of a first boot."""
        folder, home = self.folder / host, self.home(host)
        for part in (folder, home, home / ".ssh", folder / "crontabs", folder / "stage"):
            part.mkdir(mode=0o700)
        _make_key(folder / "host_key", host)
        shutil.copy(self.folder / "key.pub", home / ".ssh" / "authorized_keys")
        if host == self.names()[0]:
            shutil.copy(self.folder / "key", home / ".ssh" / "id_ed25519")
        (folder / "name").write_text(f"{host}\n")
        addresses = {"localhost": "127.0.0.1"} | {name: self.address(name) for name in self.names()}
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        (home / "bin").mkdir()
        (home / "bin" / "pdserve").write_text(
            f"#!{sys.prefix}/bin/python\nfrom pdserve.cli.entry import main\n\nmain()\n"
        )
        (home / "bin" / "pdserve").chmod(0o755)
        settings = f"export PATH=/root/bin:{sys.prefix}/bin:$PATH PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1\n"
        for file in (".profile", ".bashrc"):  # for a login shell, and for one that runs an ssh command
            (home / file).write_text(settings)

    def _index(self, host: str) -> int:
        names = self.names()
        if host not in names:
            raise HostsError(
                f"host: got {host!r}, expected one of {', '.join(names) or 'none: there are no hosts'}"
            )
        return names.index(host)

    def _port(self, host: str) -> str:
        return f"port{self._index(host)}"

    def _mac(self, host: str) -> str:
        return str(json.loads(run("ip", "-n", self.space(host), "-j", "link", "show", "eth0"))[0]["address"])

    def _first(self, host: str) -> int:
        """Its process 1, as the machine numbers it."""
        for pid in _pids(self.space(host)):
            if _number_inside(pid) == 1:
                return pid
        raise HostsError(f"{host} is halted")

    def _signal_all(self, host: str, number: signal.Signals) -> None:
        """Repeats until no new process appears that has not received it."""
        signalled: set[int] = set()
        while fresh := set(self.pids(host)) - signalled:
            for pid in fresh:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= fresh


def _pids(space: str) -> list[int]:
    """Returns all processes in a network namespace."""
    return [int(pid) for pid in run("ip", "netns", "pids", space).split()]


def _kill_all(space: str) -> None:
    """Returns when none of the namespace's processes is left. Those around a PID namespace reap it, and end
    by themselves."""
    while pids := _pids(space):
        around = {_parent(pid) for pid in pids if _number_inside(pid) == 1}
        descriptors = []
        for pid in pids:
            with suppress(ProcessLookupError):
                descriptors.append(os.pidfd_open(pid))
                if pid not in around:
                    os.kill(pid, signal.SIGKILL)
        for descriptor in descriptors:
            select.select([descriptor], [], [])
            os.close(descriptor)


def _parent(pid: int) -> int | None:
    """The parent's id; None when the process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("PPid:"):
                return int(line.split()[1])
    return None


def _number_inside(pid: int) -> int | None:
    """The process's number in a PID namespace of its own; None when it has none, or has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return int(numbers[-1]) if len(numbers) > 1 else None
    return None


def _make_key(file: Path, comment: str) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file))


def run(*command: str) -> str:
    """Returns the command's output. Raises HostsError when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
